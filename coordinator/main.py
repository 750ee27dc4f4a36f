"""The coordinator's composition root: configuration -> adapters -> shell.

Signals: SIGTERM and SIGINT finish the present batch and leave, training goes on; SIGHUP reads the
configuration again and applies what can change while it runs.
"""

import asyncio
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import grpc

from coordinator import backup, certificates, config_tariffs, descriptors, garbage, https, leaving
from coordinator import logs as logging_setup
from coordinator.access import Access, own_of
from coordinator.allocator import Allocator
from coordinator.callers import Guard
from coordinator.checkpoint_rpc import CHANNEL_OPTIONS
from coordinator.config import (
    RELOADABLE,
    Config,
    ConfigError,
    from_command_line,
    load,
    prepare_directories,
)
from coordinator.core.allocation import Columns, Solve, Solved, unsolved
from coordinator.core.coordinator import Coordinator
from coordinator.core.found import unread
from coordinator.core.linear import Linear, Optimum
from coordinator.core.model import Snapshot
from coordinator.core.quotas import Quota
from coordinator.core.restored import is_unsure
from coordinator.core.state import Options
from coordinator.events import EVENTS
from coordinator.forecast.live import LiveForecaster, pasts
from coordinator.histogram import SECONDS_BOUNDS, Histogram
from coordinator.journald import journal_of, stderr_is_journal
from coordinator.lease_advisor import LeaseAdvisor, Outlets
from coordinator.manifests import ManifestReader
from coordinator.notify import Notifier, write_port_file
from coordinator.peers import LogReader
from coordinator.ports import LeaderLost, StoreUnavailable
from coordinator.rpc import AGENTS, add_services
from coordinator.scaling_settings import power_options, rented_names, scaling_options
from coordinator.shell import TICK_MS, CoordinatorShell
from coordinator.store.sqlite import SqliteStore
from coordinator.transport import Tls, TransportError, listen, open_channel

# Rounds of the loop without which systemd may restart us; a commit that waits for a slow disk still
# counts as one.
WATCHDOG_ROUNDS = 40
SERVER_OPTIONS = (
    # A hello of a node with thousands of checkpoints is some hundred kilobytes.
    ("grpc.max_receive_message_length", 16 << 20),
    # Two coordinators on one port would share its connections between them, silently.
    ("grpc.so_reuseport", 0),
    # Agents probe an idle connection every 20 s; gRPC's default calls that an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # gRPC pings a connection on which data has come, to learn how large its window should be: with
    # ten thousand agents that say little and seldom, a quarter of what their streams cost. A
    # message that is larger than the window is still asked for whole.
    ("grpc.http2.bdp_probe", 0),
)
CLOSE_GRACE_S = 1.0
# What the solver needs, of the extra `scheduling`; without it the core's greedy decides.
SOLVER_MODULE = "highspy"


class Failed(Exception):
    """It had started; what is an operator's to mend at the start is none of his now."""


class SystemClock:
    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep_ms(self, duration_ms: int) -> None:
        await asyncio.sleep(duration_ms / 1000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 1 when it could not start or another one leads; `SystemExit` 2
    for a wrong configuration, 0 after printing it. The word `backup` first: `backup.py`."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] == backup.COMMAND:
        return backup.command(given[1:], os.environ)
    config = from_command_line(given, os.environ).config
    _log_to_stderr(config)
    try:
        leaving.run(_serve(config, given))
    except LeaderLost as error:
        logging_setup.emit("critical", "leader.lost", (("reason", str(error)),))
        return 1
    except (ConfigError, TransportError, StoreUnavailable, OSError) as error:
        logging_setup.emit("critical", "coordinator.not_started", (("reason", _in_words(error)),))
        return 1
    return 0


def _in_words(error: Exception) -> str:
    """Without the number that Python puts before a system's error."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.strerror, error.filename) if part)
    return str(error)


def _log_to_stderr(config: Config) -> None:
    """To the journal itself where stderr ends there."""
    journal = journal_of("baton-coordinator").send if stderr_is_journal(os.environ) else None
    logging_setup.configure(config.log_level, config.log_format, EVENTS, journal=journal)


async def _serve(config: Config, arguments: Sequence[str]) -> None:
    prepare_directories(config)
    tls = config.tls()
    if tls is not None and (doubt := https.doubt(tls)):
        logging_setup.emit("warning", "tls.doubted", (("reason", doubt),))
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        store = SqliteStore(Path(config.store_path))
        stack.push_async_callback(store.close)
        snapshot = await store.open()
        core = Coordinator(_options(config))
        core.load(snapshot, clock.now_ms())
        if snapshot.copied_unix_ms:
            _tell_restored(snapshot)
        shell = CoordinatorShell(core, store, clock, logging_setup.emit)
        access = _access(config, core)
        guards = [] if tls is None else [Guard(access.refuse_user, but_for=(AGENTS,))]
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=guards)
        logs = LogReader(lambda address: open_channel(address, tls))
        await add_services(
            server,
            shell,
            store,
            logs=logs,
            open_channel=lambda address: open_channel(address, tls, CHANNEL_OPTIONS),
            access=access,
        )
        port = listen(server, config.listen, tls)
        await server.start()
        stack.push_async_callback(server.stop, CLOSE_GRACE_S)
        if config.metrics_listen:
            await _open_metrics(stack, config, shell, store)
        if config.otel_endpoint:
            _open_tracing(stack, config, shell, store)
        _look_for_checkpoints(stack, core, shell, tls)
        allocator = Allocator(shell.allocation_made)
        stack.callback(allocator.close)
        shell.allocate_by(allocator)
        _forecast(stack, core, shell)
        _advise(stack, config, shell, clock)
        if config.capacity:
            _open_capacity(stack, config, shell, clock)
        address = f"{config.listen.rpartition(':')[0]}:{port}"
        logging_setup.emit(
            "info",
            "coordinator.started",
            (
                ("address", address),
                ("leader_epoch", snapshot.leader_epoch),
                ("jobs", len(snapshot.jobs)),
            ),
        )
        if config.port_file:
            write_port_file(config.port_file, address)
        await _run(shell, config, arguments)


def _access(config: Config, core: Coordinator) -> Access:
    tls, state = config.tls(), core.state
    return Access(
        tuple(config.users),
        own_of(tls) if tls else bytes,
        lambda name: name in state.nodes or name in state.forgotten,
    )


def _tell_restored(snapshot: Snapshot) -> None:
    made = datetime.fromtimestamp(snapshot.copied_unix_ms / 1000, UTC).isoformat(timespec="seconds")
    held = sum(is_unsure(job) for job in snapshot.jobs)
    reason = (
        f"it is a copy of {made}: what was submitted and decided since is not known;"
        f" jobs that stay held unless a node runs them: {held}. If it was only moved, without the"
        " hidden file beside it, `baton release --restored` lets them all go on"
    )
    logging_setup.emit("warning", "store.restored", (("reason", reason),))


async def _open_metrics(
    stack: AsyncExitStack, config: Config, shell: CoordinatorShell, store: SqliteStore
) -> None:
    """Imported here, so that a coordinator that nobody scrapes does not pay for it."""
    from coordinator.exposition import Exporter
    from coordinator.metrics import figures

    tls = config.tls()
    lag = Histogram(SECONDS_BOUNDS)
    exporter = Exporter(
        config.metrics_listen,
        lambda: figures(shell.view(), lag, store.size_bytes()),
        lag,
        None if tls is None else https.renewing(tls),
    )
    stack.push_async_callback(exporter.close)
    logging_setup.emit("info", "metrics.serving", (("url", await exporter.open()),))


def _open_tracing(
    stack: AsyncExitStack, config: Config, shell: CoordinatorShell, store: SqliteStore
) -> None:
    """Imported here: it is an extra, and nobody else pays for it."""
    from coordinator.otel import SpanExporter

    exporter = SpanExporter(config.otel_endpoint, store.events, logging_setup.emit)
    exporter.open()
    stack.push_async_callback(exporter.close)
    shell.trace_to(exporter)
    logging_setup.emit("info", "tracing.exporting", (("url", exporter.url),))


def _open_capacity(
    stack: AsyncExitStack, config: Config, shell: CoordinatorShell, clock: SystemClock
) -> None:
    """Imported here: most coordinators switch no node, and drivers bring clients of their own."""
    from coordinator.capacity.opening import open_actuator

    actuator = open_actuator(
        config, shell.actuated, is_up=shell.is_up, clock=clock, log=logging_setup.emit
    )
    stack.push_async_callback(actuator.close)
    shell.act_through(actuator)


def _look_for_checkpoints(
    stack: AsyncExitStack, core: Coordinator, shell: CoordinatorShell, tls: Tls | None
) -> None:
    """Those that a store which was put back has forgotten."""

    def ended(reason: str) -> None:
        """Jobs go on from what the copy knows."""
        logging_setup.emit("error", "manifests.stopped", (("reason", reason),))

    reader = ManifestReader(
        lambda: unread(core.state),
        shell.request,
        lambda address: open_channel(address, tls, CHANNEL_OPTIONS),
    )
    _beside(stack, reader.run(), ended)


def _forecast(stack: AsyncExitStack, core: Coordinator, shell: CoordinatorShell) -> None:
    forecaster = LiveForecaster(pasts(core.state.demand_history), shell.forecast_made)
    shell.forecast_by(forecaster)

    def ended(reason: str) -> None:
        """Forecasts become stale, and nothing is planned by them."""
        text = f"forecasts have stopped: {reason}"
        logging_setup.emit("error", "forecast.stopped", (("reason", text),))

    _beside(stack, forecaster.run(), ended)


def _advise(
    stack: AsyncExitStack, config: Config, shell: CoordinatorShell, clock: SystemClock
) -> None:
    outlets = Outlets(config.lease_file, config.lease_webhook)
    solves = importlib.util.find_spec(SOLVER_MODULE) is not None
    advisor = LeaseAdvisor(
        shell.leases_made,
        outlets,
        clock,
        logging_setup.emit,
        solve=_solve_linear if solves else None,
    )
    shell.lease_by(advisor)

    def ended(reason: str) -> None:
        logging_setup.emit("error", "leases.stopped", (("reason", reason),))

    _beside(stack, advisor.run(), ended)


def _beside(
    stack: AsyncExitStack, work: Coroutine[None, None, None], ended: Callable[[str], None]
) -> None:
    """Beside the loop, until we leave; what ends it earlier is a bug of ours, and is told."""
    beside = asyncio.create_task(work)

    def done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            ended(repr(task.exception()))

    async def end() -> None:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)

    beside.add_done_callback(done)
    stack.push_async_callback(end)


async def _run(shell: CoordinatorShell, config: Config, arguments: Sequence[str]) -> None:
    notifier = Notifier(os.environ)
    loop = asyncio.get_running_loop()

    def leave(number: signal.Signals) -> None:
        notifier.stopping()
        told = (
            ("signal", number.name),
            ("running", shell.running_jobs()),
            ("grace_ms", round(CLOSE_GRACE_S * 1_000)),
        )
        logging_setup.emit("info", "coordinator.stopping", told)
        shell.leave()

    def reload() -> None:
        nonlocal config
        config = _reload(config, arguments, notifier)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
    beside = [
        asyncio.create_task(_watch(shell, notifier)),
        asyncio.create_task(garbage.collect_seldom()),
        asyncio.create_task(descriptors.watch(logging_setup.emit)),
    ]
    if tls := config.tls():
        beside.append(asyncio.create_task(certificates.watch(tls, logging_setup.emit)))
    notifier.ready()
    try:
        await shell.run()
    except OSError as error:
        logging_setup.emit("critical", "coordinator.failed", (("reason", _in_words(error)),))
        raise Failed from error
    finally:
        for task in beside:
            task.cancel()
    logging_setup.emit("info", "coordinator.stopped", ())


async def _watch(shell: CoordinatorShell, notifier: Notifier) -> None:
    """Tell systemd that we live, as long as the loop really goes round."""
    interval_ms = notifier.watchdog_interval_ms()
    if interval_ms is None:
        return
    clock = SystemClock()
    while True:
        if clock.now_ms() - shell.progress_ms < WATCHDOG_ROUNDS * TICK_MS:
            notifier.watchdog()
        await clock.sleep_ms(interval_ms // 3)


def _reload(current: Config, arguments: Sequence[str], notifier: Notifier) -> Config:
    """Read the configuration again; returns what is in force now. What a restart alone can change
    (it costs no training) is named in the log."""
    notifier.reloading()
    try:
        fresh = load(arguments, os.environ).config
    except ConfigError as error:
        for sentence in error.sentences:
            logging_setup.emit("error", "config.refused", (("reason", sentence),))
        fresh = current
    else:
        _log_to_stderr(fresh)
        changed = [
            field
            for field in fresh.__struct_fields__
            if field not in RELOADABLE and getattr(fresh, field) != getattr(current, field)
        ]
        if changed:
            fields = (("fields", changed), ("reason", "they take effect at the next start"))
            logging_setup.emit("warning", "config.needs_restart", fields)
        logging_setup.emit("info", "config.reloaded", (("log_level", fresh.log_level),))
    notifier.ready()
    return fresh


def _options(config: Config) -> Options:
    return Options(
        heartbeat_interval_ms=config.heartbeat_interval_ms,
        report_interval_ms=config.report_interval_ms,
        suspect_ms=config.suspicious_ms(),
        lease_ms=config.lease_ms,
        closed_grace_ms=config.closed_grace_ms,
        restart_grace_ms=config.restart_grace_ms,
        hellos_per_s=config.hellos_per_s,
        cordons_gpus=config.health_reaction != "report",
        cordons_degraded=config.health_reaction == "degraded",
        cordon_percent=config.health_cordon_percent,
        cordon_window_ms=config.health_cordon_window_ms,
        projects={
            name: Quota(project.gpu_hours_per_day, project.weight)
            for name, project in config.projects.items()
        },
        solve=_solve if importlib.util.find_spec(SOLVER_MODULE) is not None else None,
        prices=config_tariffs.prices(
            config.tariffs, config.energy_usd_per_mwh, config.power_overhead_percent
        ),
        leases=config_tariffs.leases(config.leases),
        burst_nodes=(*config.burst_nodes, *rented_names(config)),
        moves_per_hour=config.moves_per_hour,
        reservation_wait_ms=config.reservation_wait_ms,
        reservation_ms=config.reservation_ms,
        power=power_options(config),
        scaling=scaling_options(config),
        demand_minute_ms=config.demand_minute_ms,
        jobs_kept=config.jobs_kept,
    )


def _solve(columns: Columns) -> Solved:
    solve = _solver()
    return unsolved(columns) if solve is None else solve(columns)


def _solve_linear(program: Linear) -> Optimum | None:
    """Of leases, where work may wait."""
    if _solver() is None:
        return None
    from coordinator.lease_solver import solve

    return solve(program)


@cache
def _solver() -> Solve | None:
    """Imported at the first decision that needs it: fifteen megabytes, which a fleet without jobs
    on GPUs does not pay for. One that is there and cannot be loaded must not end a coordinator in
    the middle of its work; the core's greedy decides."""
    try:
        from coordinator.solver import solve
    except ImportError as error:
        logging_setup.emit("warning", "solver.not_loaded", (("reason", str(error)),))
        return None
    return solve
