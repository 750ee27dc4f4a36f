"""The agent's composition root: configuration -> adapters -> shell. Only this file names them all.

Signals: SIGTERM and SIGINT say goodbye and leave the trainers running; SIGHUP reads the
configuration again and applies what can change while it runs.
"""

import asyncio
import importlib.util
import os
import random
import secrets
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from agent import certificates, host_identity, https
from agent import logs as logging_setup
from agent.chunks.peers import PeerClient
from agent.chunks.service import ChunkService
from agent.chunks.store import ChunkStore
from agent.chunks.threads import crew
from agent.config import (
    RELOADABLE,
    Config,
    ConfigError,
    from_command_line,
    load,
    prepare_directories,
)
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from agent.core.state import Options
from agent.core.trainer_messages import TrainerMessage
from agent.events import EVENTS
from agent.histogram import SECONDS_BOUNDS, Histogram
from agent.journal import SqliteJournal
from agent.journald import journal_of, stderr_is_journal
from agent.notify import Notifier, write_port_file
from agent.peer import PeerServer
from agent.ports import ChunkError, JournalUnavailable, Ports, Processes
from agent.processes import logs
from agent.processes.forks import ForkServers, Warmth
from agent.processes.groups import Groups, NoGroups, make_home
from agent.processes.mps import CONTROL, MpsProcesses
from agent.processes.supervisor import Supervisor
from agent.processes.units import SOCKET, Units
from agent.pulse import standing
from agent.sdk_server import SdkServer
from agent.shell import AgentShell
from agent.slabs import Slabs
from agent.telemetry.probe import NvmlProbe
from agent.telemetry.xid_table import TableError, load_table
from agent.telemetry.xids import Xids
from agent.transport import Tls, TransportError
from agent.uplink import GrpcUplink
from agent.waiver import waive
from agent.workspace import AttemptDirectories

# For readings, directories and logs: a driver that blocks keeps a few, and reading logs is quick.
THREADS = 8
# What an operator can mend.
_NOT_STARTED = (
    ConfigError,
    TableError,
    TransportError,
    host_identity.HostChanged,
    ChunkError,
    JournalUnavailable,
    OSError,
)


class Failed(Exception):
    """It had started; what is an operator's to mend at the start is none of his now."""


class SystemClock:
    def now_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep_ms(self, duration_ms: int) -> None:
        await asyncio.sleep(duration_ms / 1000)


class SystemChance:
    def token(self) -> str:
        return secrets.token_hex(16)

    def draw(self) -> float:
        return random.random()


class _Ears:
    """Passes trainers' words on to the shell, which is made after the socket server."""

    def __init__(self) -> None:
        self.shell: AgentShell | None = None

    def __call__(self, attempt_id: str, message: TrainerMessage) -> None:
        if self.shell is not None:
            self.shell.on_trainer_message(attempt_id, message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM, 1 when it could not start; `SystemExit` 2 for a wrong
    configuration, 0 after printing it."""
    given = sys.argv[1:] if arguments is None else arguments
    config = from_command_line(given, os.environ).config
    _log_to_stderr(config)
    try:
        asyncio.run(_begin(config, given))
    except _NOT_STARTED as error:
        logging_setup.emit("critical", "agent.not_started", (("reason", _in_words(error)),))
        return 1
    return 0


def _in_words(error: Exception) -> str:
    """Without the number that Python puts before a system's error."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.strerror, error.filename) if part)
    return str(error)


def _log_to_stderr(config: Config) -> None:
    """To the journal itself where stderr ends there."""
    journal = journal_of("baton-agent").send if stderr_is_journal(os.environ) else None
    logging_setup.configure(
        config.log_level, config.log_format, EVENTS, journal=journal, node=config.node
    )


def _checked(tls: Tls | None) -> Tls | None:
    """The same. Raises `TransportError` for files that do not serve, and warns of a certificate
    that others will refuse."""
    if tls is not None and (doubt := https.doubt(tls)):
        logging_setup.emit("warning", "tls.doubted", (("reason", doubt),))
    return tls


async def _begin(config: Config, arguments: Sequence[str]) -> None:
    """With all the threads that it will need: later there may be none."""
    asyncio.get_running_loop().set_default_executor(crew(THREADS, "agent"))
    await _serve(config, arguments)


async def _serve(config: Config, arguments: Sequence[str]) -> None:
    prepare_directories(config)
    state_directory = Path(config.state_directory)
    host_identity.check(state_directory)
    tls = _checked(config.tls())
    xids = load_table(config.xid_table)
    async with AsyncExitStack() as stack:
        journal = SqliteJournal(state_directory / "journal.sqlite3")
        stack.push_async_callback(journal.close)
        memory = await journal.open(secrets.token_hex(16))
        memory = await waive(state_directory, journal, memory, logging_setup.emit)
        processes = _processes(config, stack)
        store = ChunkStore(state_directory / "chunks")
        # The supervisor's records and logs, and apart from them what trainers write into.
        attempts_directory = state_directory / "attempts"
        workspaces = state_directory / "workspaces"
        directories = AttemptDirectories(workspaces)
        await asyncio.to_thread(directories.sweep, {record.id for record in memory.attempts})
        chunks = ChunkService(store, PeerClient(tls), staging_root=workspaces)
        stack.push_async_callback(chunks.close)
        await chunks.open()
        peer_server = _peer_server(config, store, attempts_directory, tls)
        stack.push_async_callback(peer_server.close)
        port = await peer_server.open()
        ears = _Ears()
        slabs = Slabs(config.slab_memory_percent / 100)
        stack.callback(slabs.close)
        trainers = SdkServer(Path(config.runtime_directory), ears, slabs)
        stack.push_async_callback(trainers.close)
        await trainers.open()
        errors = Xids(config.kernel_log)
        stack.callback(errors.close)
        probe = await _open_probe(stack, config, errors.make())
        options = Options(
            config.advertised(port),
            _launch_options(config, trainers, workspaces),
            config.shared_place(),
            config.hang_floor_ms,
            xids,
        )
        ports = Ports(
            SystemClock(),
            SystemChance(),
            probe,
            processes,
            directories,
            trainers,
            slabs,
            chunks,
            journal,
            GrpcUplink(config.coordinator, tls),
            logging_setup.emit,
            asyncio.to_thread,
            errors,
            config.sample_interval_ms,
        )
        shell = AgentShell(NodeCore(options, memory), ports)
        ears.shell = shell
        if config.metrics_listen:
            await _open_metrics(stack, config, shell)
        await _run(shell, config, arguments, probe, options.peer_address)


def _peer_server(
    config: Config, store: ChunkStore, attempts_directory: Path, tls: Tls | None
) -> PeerServer:
    return PeerServer(
        store,
        _LogSource(attempts_directory),
        address=config.listen,
        tls=tls,
        chunk_port=config.chunk_port,
        callers=config.peers,
    )


async def _open_probe(stack: AsyncExitStack, config: Config, event_descriptor: int) -> NvmlProbe:
    probe = NvmlProbe(
        Path(config.state_directory),
        allowed_uuids=config.allowed_gpus(),
        event_descriptor=event_descriptor,
        rate=config.telemetry_rate,
        pcie_throughput=config.telemetry_pcie_throughput,
    )
    stack.callback(probe.close)
    await asyncio.to_thread(probe.open)
    if probe.absence:
        logging_setup.emit("warning", "gpu.absent", (("reason", probe.absence),))
    return probe


async def _open_metrics(stack: AsyncExitStack, config: Config, shell: AgentShell) -> None:
    """Imported here, so that an agent that nobody scrapes does not pay for it."""
    from agent.exposition import Exporter
    from agent.metrics import figures

    tls = config.tls()
    lag = Histogram(SECONDS_BOUNDS)
    exporter = Exporter(
        config.metrics_listen,
        lambda: figures(shell.view(), lag, dcgm_names=config.metrics_dcgm_names),
        lag,
        None if tls is None else https.renewing(tls),
    )
    stack.push_async_callback(exporter.close)
    logging_setup.emit("info", "metrics.serving", (("url", await exporter.open()),))


async def _run(
    shell: AgentShell,
    config: Config,
    arguments: Sequence[str],
    probe: NvmlProbe,
    peer_address: str,
) -> None:
    notifier = Notifier(os.environ)
    loop = asyncio.get_running_loop()

    def leave() -> None:
        notifier.stopping()
        shell.leave(config.restart_absence_ms)

    def reload() -> None:
        nonlocal config
        config = _reload(config, arguments, notifier)
        probe.set_rate(config.telemetry_rate)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    loop.add_signal_handler(signal.SIGHUP, reload)
    beside = [asyncio.create_task(_watch(shell, notifier))]
    if tls := config.tls():
        beside.append(asyncio.create_task(certificates.watch(tls, logging_setup.emit)))
    logging_setup.emit(
        "info",
        "agent.started",
        (("peer_address", peer_address), ("coordinator", config.coordinator)),
    )
    if config.port_file:
        write_port_file(config.port_file, peer_address)
    try:
        await shell.run()
    except OSError as error:
        if not shell.opened.is_set():
            raise  # the state directory cannot be used: that is the start itself
        logging_setup.emit("critical", "agent.failed", (("reason", _in_words(error)),))
        raise Failed from error
    finally:
        for task in beside:
            task.cancel()
    logging_setup.emit("info", "agent.stopped", ())


async def _watch(shell: AgentShell, notifier: Notifier) -> None:
    """Tell systemd that we are ready, and then that we live, as long as every loop moves."""
    await shell.opened.wait()
    notifier.ready()
    interval_ms = notifier.watchdog_interval_ms()
    if interval_ms is None:
        return
    clock = SystemClock()
    said = ""
    while True:
        stands = standing(clock.now_ms(), shell.pulse())
        if stands is None:
            notifier.watchdog()
        elif stands.loop != said:
            still_ms = clock.now_ms() - stands.moved_ms
            logging_setup.emit(
                "error", "watchdog.withheld", (("loop", stands.loop), ("still_ms", still_ms))
            )
        said = "" if stands is None else stands.loop
        shell.nudge()
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


def _launch_options(config: Config, trainers: SdkServer, workspaces: Path) -> LaunchOptions:
    return LaunchOptions(
        config.node,
        trainers.socket_path,
        str(workspaces),
        config.trainer_python,
        tuple(sorted(config.trainer_environment.items())),
        _hook_directory(),
    )


def _hook_directory() -> str:
    """The directory for the PYTHONPATH of unmodified scripts; empty when it is not installed. It
    is found and not imported: what trainers import is no business of the agent."""
    spec = importlib.util.find_spec("baton_hook")
    if spec is None or spec.origin is None:
        return ""
    return str(Path(spec.origin).parent / "path")


def _warmth(config: Config) -> Warmth | None:
    """What built-in trainers begin with, if they are to be forked."""
    if not config.warm_start:
        return None
    return Warmth(config.trainer_python, ("trainers.warm",), config.trainer_environment)


def _processes(config: Config, stack: AsyncExitStack) -> Processes:
    """With trainers as services of systemd where that can be asked for, else as processes of this
    agent's own unit. Those have the agent's user, and so has MPS."""
    units = forks = None
    if config.job_units and SOCKET.exists():
        units = Units(SOCKET, warmth=_warmth(config))
        logging_setup.emit("info", "agent.job_units", (("launcher", str(SOCKET)),))
    else:
        forks = ForkServers(_warmth(config))
        stack.push_async_callback(forks.close)
        forks.open()
    supervisor = Supervisor(
        Path(config.state_directory),
        forks=forks,
        units=units,
        groups=None if units else _groups(Path(config.state_directory)),
        log_bytes_max=config.job_log_bytes_max,
    )
    control = shutil.which(CONTROL) if config.mps == "auto" and units is None else None
    return MpsProcesses(supervisor, Path(config.runtime_directory) / "mps", control or "")


def _groups(state_directory: Path) -> Groups:
    """A control group for each trainer, where this agent may make any."""
    try:
        home = make_home(state_directory)
    except NoGroups as error:
        logging_setup.emit("info", "agent.no_job_groups", (("reason", str(error)),))
        return Groups(None)
    logging_setup.emit("info", "agent.job_groups", (("group", str(home)),))
    return Groups(home)


class _LogSource:
    """What peers and the coordinator may read of an attempt's output."""

    def __init__(self, attempts_directory: Path) -> None:
        self._root = attempts_directory

    async def __call__(
        self, attempt_id: str, offset: int, follow: bool, tail_bytes: int
    ) -> AsyncIterator[tuple[int, bytes]]:
        directory = self._root / attempt_id
        if tail_bytes:
            end = await asyncio.to_thread(logs.end_offset, directory)
            offset = max(0, end - tail_bytes)
        if follow:
            async for piece in logs.follow(directory, offset):
                yield piece.next_offset - len(piece.data), piece.data
            return
        while True:
            piece = await asyncio.to_thread(logs.read, directory, offset)
            if not piece.data:
                return
            yield piece.next_offset - len(piece.data), piece.data
            offset = piece.next_offset
