"""The coordinator's configuration: every field with its unit, default and reason.

Problem: times that belong together drift apart when each is set alone: a lease shorter than two
heartbeats loses healthy nodes, a grace longer than the lease never comes to bear. So the fields
stand here once, each with what it means, and `validate` answers in sentences, also about fields
that must fit one another. `sources.py` reads them from file, environment and flags; `--help` and
`systemd/coordinator.toml` say the same words.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from coordinator import config_projects, config_tariffs
from coordinator.capacity_settings import CREDENTIAL_FIELDS, CapacityGroup, capacity_problems
from coordinator.config_projects import Project
from coordinator.config_tariffs import Lease, Tariff
from coordinator.endpoints import otel_problem, webhook_problem
from coordinator.scaling_settings import TypeScaling, scaling_problems
from coordinator.sources import (
    LOG_FORMATS,
    LOG_LEVELS,
    TLS_FIELDS,
    ConfigError,
    Loaded,
    Program,
    address_problem,
    choice_problem,
    load_or_exit,
    own_directory,
    path_problem,
    print_config,
    range_problem,
    says,
    tls_problem,
    with_credentials,
)
from coordinator.sources import load as load_program

if TYPE_CHECKING:
    from coordinator.transport import Tls

__all__ = [
    "RELOADABLE",
    "Config",
    "ConfigError",
    "Loaded",
    "from_command_line",
    "load",
    "prepare_directories",
    "print_config",
]

# What SIGHUP takes over. Agents learn intervals and lease in their welcome, so a change there needs
# a restart, which costs no training.
RELOADABLE: Final = frozenset({"log_level"})

STORE_NAME: Final = "baton.sqlite3"
HEARTBEAT_INTERVAL_MS_MIN: Final = 100  # ten thousand agents at more would keep a core busy
HEARTBEAT_INTERVAL_MS_MAX: Final = 60_000  # slower, and what people see is history
REPORT_INTERVAL_MS_MIN: Final = 100  # agents read no faster
REPORT_INTERVAL_MS_MAX: Final = 60_000  # as for heartbeats
HEARTBEATS_PER_LEASE_MIN: Final = 2  # one lost or late heartbeat must not cost a node its jobs
SUSPECT_MS_MIN = 3_000  # a busy box is late by hundreds of milliseconds
HEARTBEATS_TO_SUSPECT = 3
LEASE_MS_MAX: Final = 600_000  # a node silent for ten minutes is dead by anybody's measure
HEALTH_REACTIONS: Final = ("cordon", "degraded", "report")
CORDON_WINDOW_MS_MAX: Final = 86_400_000  # a day; a longer memory is a limit for good
MOVES_PER_HOUR_MAX: Final = 10_000  # three a second: that is no bound any more
RESTART_GRACE_MS_MAX: Final = 600_000  # the same, for nodes that do not return after our restart
RESERVATION_WAIT_MS_MAX: Final = 604_800_000  # a week; who waits longer has been forgotten
RESERVATION_MS_MAX: Final = 86_400_000  # a day of an idle GPU is more than a large job gains
HELLOS_PER_S_MIN: Final = 40  # as many nodes as may join then come in within ten minutes
HELLOS_PER_S_MAX: Final = 10_000  # a whole fleet at once: none is told to wait
# Twice what pins may keep (`PINS_MAX`): jobs without one are kept, too.
JOBS_KEPT_MIN: Final = 2_000
JOBS_KEPT_MAX: Final = 100_000  # as many as may be open; a start then takes a minute


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator may set. The text beside a field is its help, and its comment in
    `systemd/coordinator.toml`."""

    # fmt: off
    listen: Annotated[str, says(
        "HOST:PORT where agents and clients call. Port 0 takes a free one; anything but loopback "
        "needs TLS."
    )] = "127.0.0.1:7070"
    state_directory: Annotated[str, says(
        "Where the state lives; made with mode 0700, because submissions hold secrets."
    )] = "/var/lib/baton/coordinator"
    store_path: Annotated[str, says(
        "The SQLite file; on a local disk, whose fsync can be trusted. `baton-coordinator backup "
        "FILE` copies it, also while it is used. Default (empty): baton.sqlite3 in the state "
        "directory."
    )] = ""
    heartbeat_interval_ms: Annotated[int, says(
        "Milliseconds between heartbeats of an agent, 100 to 60000. Once a second makes death "
        "visible within the lease at a cost that ten thousand agents may have."
    )] = 1_000
    report_interval_ms: Annotated[int, says(
        "Milliseconds between two reports of an agent's telemetry, 100 to 60000: the last reading, "
        "and minimum, maximum and mean of all since the report before. It goes with a heartbeat, "
        "so no more often than these; events and verdicts go at once. Once in five seconds is "
        "enough for people and dashboards, at a fifth of the cost."
    )] = 5_000
    suspect_ms: Annotated[int, says(
        "Milliseconds without a heartbeat after which a node is suspect: it gets no new work, and "
        "keeps what it has. Default (0): three heartbeats, at least three seconds; at most the "
        "lease."
    )] = 0
    lease_ms: Annotated[int, says(
        "Milliseconds without a heartbeat after which a node is lost and its jobs move; at least "
        "two heartbeats. Eight seconds outlast a box that swaps or a switch that hiccups, and "
        "leave two of ten for the handoff. Three are possible on a quiet network; across sites "
        "take 30."
    )] = 8_000
    closed_grace_ms: Annotated[int, says(
        "The same when the agent's connection was closed, which a dying process does; at most the "
        "lease. Three seconds let systemd restart an agent before its jobs move."
    )] = 3_000
    restart_grace_ms: Annotated[int, says(
        "Milliseconds after the coordinator's own start in which no node is lost. Agents need up "
        "to five seconds of back-off to find it again, and then a lease. For each hundred nodes "
        "comes a second more, in which they are let in."
    )] = 13_000
    hellos_per_s: Annotated[int, says(
        "Agents that are let in each second, 40 to 10000. The others stand in line on their "
        "connection and are not lost; as many as come in one second never wait. Two cores with "
        "nothing else to do answer some 800 hellos a second, busy ones half of that: more would "
        "only wait in the inbox, with the heartbeats of those who are in behind them."
    )] = 500
    health_reaction: Annotated[str, says(
        "What follows from a GPU that needs a reset or a reboot, or is lost: cordon (no new work, "
        "and its jobs are handed off), degraded (the same for degraded ones), or report (nothing "
        "but the report). Resets and reboots are a person's in any case."
    )] = "cordon"
    health_cordon_percent: Annotated[int, says(
        "Share of the fleet's GPUs, 1 to 100, that may be cordoned for their health within "
        "health_cordon_window_ms, at least one GPU. More at once are rather a bad driver or a "
        "wrong monitor than bad GPUs, and are only reported."
    )] = 10
    health_cordon_window_ms: Annotated[int, says(
        "Milliseconds of that, 1000 to 86400000. Ten minutes are time for a person to look before "
        "the next tenth goes."
    )] = 600_000
    projects: Annotated[dict[str, Project], says(
        "Quotas of projects (docs/quotas.md), a table for each: gpu_hours_per_day, 0 to 10000000, "
        "in hours of an H100, of which other types count a part; 24 are one H100 without a pause. "
        "And weight, 0.01 to 100, default 1, of its part of what is lent. With the first table, "
        "projects without one have no quota and run on what is lent. As a flag: "
        "demo={gpu_hours_per_day=48}. Default (empty): no project comes before another."
    )] = msgspec.field(default_factory=dict)
    moves_per_hour: Annotated[int, says(
        "How many running jobs may be stopped within an hour, with their checkpoint, so that a job "
        "of their class or they themselves run where that is worth more; 0 to 10000, and 0 is "
        "never. No job before it has run for ten minutes, or ten times what its restart takes. "
        "One a minute is more than a fleet of a dozen jobs can use, and on a large one the traffic "
        "of one checkpoint at a time. Who gives way to a higher class is not counted."
    )] = 60
    reservation_wait_ms: Annotated[int, says(
        "Milliseconds that a job of several GPUs waits before the largest of its class gets room "
        "reserved, up to 604800000; 0: never. Ten minutes are no wait for a large job, and most "
        "get their room within them without it."
    )] = 600_000
    reservation_ms: Annotated[int, says(
        "Milliseconds after which a reservation expires, 1000 to 86400000: no GPU idles for one "
        "any longer. Half an hour sees most small jobs end; take what yours last, where they do "
        "not say how many steps they have."
    )] = 1_800_000
    capacity: Annotated[dict[str, CapacityGroup], says(
        "Who switches nodes on and off (docs/capacity.md), a table for each group of nodes: nodes "
        "(n[01-40,43]), driver (programs, redfish, ipmi, wake, burst or simulated), the fields of "
        "that driver, and deadline_ms, 1000 to 7200000, default 600000: longer than a switch of "
        "its slowest node takes. Secrets are in credentials_file. As a flag: "
        "rack1={nodes='n[01-40]', driver='simulated'}. Default (empty): nobody, and no node is "
        "switched."
    )] = msgspec.field(default_factory=dict)
    tariffs: Annotated[dict[str, Tariff], says(
        "What GPUs cost and draw (docs/cost.md), a table for each type, named as in baton fit: "
        "lease_usd, burst_usd and owned_usd an hour, and loaded_watts; what is left out is as in "
        "the dated table of the package. As a flag: H100={lease_usd=2.1}. Default (empty): that "
        "table."
    )] = msgspec.field(default_factory=dict)
    leases: Annotated[dict[str, Lease], says(
        "What is leased, a table for each lease: gpu_type, gpus, begin and end as days by UTC, "
        "nodes as a pattern of their names, and usd for each GPU and hour. Paid for whether used "
        "or not; nothing is ever leased by Baton. Default (empty): nothing."
    )] = msgspec.field(default_factory=dict)
    lease_file: Annotated[str, says(
        "File that gets, once a day, what is worth leasing, as `baton leases --json` prints it "
        "(docs/cost.md); readable for its owner alone. One in the state directory needs no change "
        "of the unit. Default (empty): none; the log has it in any case."
    )] = ""
    lease_webhook: Annotated[str, says(
        "http(s)://HOST[:PORT]/PATH that gets the same as the body of a POST; it has ten seconds, "
        "and is tried up to eight times within some ten minutes. Who reads this file reads its "
        "path. Default (empty): none."
    )] = ""
    burst_nodes: Annotated[list[str], says(
        "Patterns of the names of nodes that are rented by the hour, as cloud-*. All that are "
        "neither these nor leased are your own. Default (empty): none."
    )] = msgspec.field(default_factory=list)
    energy_usd_per_mwh: Annotated[int, says(
        "US dollars for a megawatt-hour of electricity, 0 to 10000. 120 are a mean of the USA."
    )] = 120
    power_overhead_percent: Annotated[int, says(
        "Watts at a node's plug for each 100 of its GPUs, 100 to 1000: host, fans and losses, and "
        "cooling where you pay for it. 150 were measured of a box with eight H100 in training."
    )] = 150
    scaling_mode: Annotated[str, says(
        "What follows from the plan of the fleet's size (docs/scaling.md): observe (it is written "
        "down), advise (and proposed, for a person to approve), or act. Default (empty): observe "
        "for the first 14 days of demand, then advise. Without 'capacity' nothing is ever switched."
    )] = ""
    scaling_interval_ms: Annotated[int, says(
        "Milliseconds between two plans, 1000 to 600000. Demand is sampled once a minute."
    )] = 60_000
    scaling_wait_ratio: Annotated[int, says(
        "What a GPU-hour of work that waits costs, in GPU-hours that idle; 1 to 10000. 19 plans "
        "for the demand that is not exceeded in 95 of 100 cases."
    )] = 19
    scaling_idle_ms: Annotated[int, says(
        "Milliseconds that a node is empty before it may go off, up to 604800000."
    )] = 3_600_000
    scaling_up_ms: Annotated[int, says(
        "Milliseconds that a node which was started stays on at least, up to 604800000."
    )] = 7_200_000
    scaling_spares: Annotated[int, says(
        "Empty nodes of each GPU type that stay on, 0 to 10000."
    )] = 1
    scaling_of: Annotated[dict[str, TypeScaling], says(
        "What differs for a GPU type, a table for each, named as in baton fit: spares. As a flag: "
        "H100={spares=2}. Default (empty): nothing."
    )] = msgspec.field(default_factory=dict)
    scaling_margin_percent: Annotated[int, says(
        "What stays on beyond what is likely to be needed, of that, 0 to 100. 0: spares are margin."
    )] = 0
    scaling_cycles_per_day: Annotated[int, says(
        "How often a node may be started within a day, 1 to 16: power supplies and disks age by it."
    )] = 4
    scaling_boot_ms: Annotated[int, says(
        "Milliseconds that a node takes from the order until its agent says hello, 1000 to "
        "7200000, of a model of which not twenty starts have been seen."
    )] = 540_000
    scaling_boot_deadline_ms: Annotated[int, says(
        "Milliseconds after which a start has failed, 1000 to 14400000, and more than "
        "'scaling_boot_ms'; it is tried twice more, then the node is left to a person."
    )] = 1_200_000
    scaling_stop_deadline_ms: Annotated[int, says(
        "Milliseconds after which a node that was ordered off and is heard stays on, once its "
        "driver has answered, 1000 to 14400000: more than 'deadline_ms' of every table in "
        "'capacity', or a late driver could switch it off after it has taken work again."
    )] = 900_000
    demand_minute_ms: Annotated[int, says(
        "How many milliseconds a minute of demand and of the plan lasts, 250 to 60000. For "
        "demonstrations and tests, with a state directory of their own: scaling_idle_ms, "
        "scaling_up_ms and all that the rule calls hours and days go by in such minutes, and every "
        "page that shows demand takes them for real ones."
    )] = 60_000
    scaling_budget_usd_per_day: Annotated[int, says(
        "US dollars a day for nodes that are rented by the hour ('burst' in 'capacity'), 0 to "
        "10000000. 0: nothing is ever rented."
    )] = 0
    scaling_spends_alone: Annotated[bool, says(
        "Rent within that budget without asking. false: a person agrees, `baton scale approve`."
    )] = False
    jobs_kept: Annotated[int, says(
        "How many jobs that have ended are kept, with their attempts and history, 2000 to 100000; "
        "those that ended first leave first. `baton cost` and `baton projects` know no others. "
        "A start reads them all but for their histories, ten thousand in some five seconds, and "
        "with full histories these are 0.6 GB of the database. Fewer than before: the others are "
        "forgotten for good, a few hundred a second."
    )] = 10_000
    metrics_listen: Annotated[str, says(
        "HOST:PORT where Prometheus reads /metrics. Port 0 takes a free one, which the log names; "
        "anything but loopback needs TLS, and then its scraper needs a certificate. Default "
        "(empty): nowhere."
    )] = ""
    otel_endpoint: Annotated[str, says(
        "http(s)://HOST:PORT of an OpenTelemetry collector, which gets the spans of each attempt "
        "by OTLP over HTTP (/v1/traces). Needs gpu-baton[otel]. Default (empty): none."
    )] = ""
    tls_cert: Annotated[str, says(
        "PEM file with the coordinator's certificate chain; as the other two, it may begin with "
        "$CREDENTIALS_DIRECTORY, where a service finds what LoadCredential= names. Default "
        "(empty): no TLS, loopback only."
    )] = ""
    tls_key: Annotated[str, says("PEM file with its private key.")] = ""
    tls_ca: Annotated[str, says(
        "PEM file with the authority whose certificates the fleet trusts."
    )] = ""
    users: Annotated[list[str], says(
        "Names in certificates, * for any part, that may submit jobs and manage the fleet; none of "
        "them is a node. Default (empty): all but those of its nodes."
    )] = msgspec.field(default_factory=list)
    log_level: Annotated[str, says(
        "debug, info, warning or error: the least that is logged. SIGHUP takes it over."
    )] = "info"
    log_format: Annotated[str, says(
        "json (one object a line, for machines), console (for people), or auto: console when "
        "stderr is a terminal, entries with fields of their own when it is systemd's journal."
    )] = "auto"
    port_file: Annotated[str, says(
        "File that gets the bound HOST:PORT once the coordinator serves, for tools that let it "
        "choose its port. Default (empty): none."
    )] = ""
    # fmt: on

    def validate(self) -> list[str]:
        """What is wrong, as sentences that say what to change; empty when all is well."""
        found = [
            address_problem("listen", self.listen, port_min=0)
            or tls_problem(self.tls_cert, self.tls_key, self.tls_ca)
            or _listen_problem(self.listen, self.tls()),
            self._metrics_problem(),
            "users names everybody" if any(not one.strip("*? ") for one in self.users) else None,
            self.otel_endpoint and otel_problem(self.otel_endpoint),
            path_problem("state_directory", self.state_directory),
            path_problem("store_path", self.store_path),
            range_problem(
                "heartbeat_interval_ms",
                self.heartbeat_interval_ms,
                HEARTBEAT_INTERVAL_MS_MIN,
                HEARTBEAT_INTERVAL_MS_MAX,
            ),
            range_problem(
                "report_interval_ms",
                self.report_interval_ms,
                REPORT_INTERVAL_MS_MIN,
                REPORT_INTERVAL_MS_MAX,
            ),
            self._lease_problem(),
            self._suspect_problem(),
            self._closed_grace_problem(),
            range_problem("restart_grace_ms", self.restart_grace_ms, 0, RESTART_GRACE_MS_MAX),
            range_problem("hellos_per_s", self.hellos_per_s, HELLOS_PER_S_MIN, HELLOS_PER_S_MAX),
            choice_problem("health_reaction", self.health_reaction, HEALTH_REACTIONS),
            range_problem("health_cordon_percent", self.health_cordon_percent, 1, 100),
            range_problem(
                "health_cordon_window_ms", self.health_cordon_window_ms, 1_000, CORDON_WINDOW_MS_MAX
            ),
            *config_projects.problems(self.projects),
            *capacity_problems(self.capacity),
            *config_tariffs.problems(self.tariffs),
            *config_tariffs.lease_problems(self.leases),
            self.lease_file and path_problem("lease_file", self.lease_file),
            self.lease_webhook and webhook_problem("lease_webhook", self.lease_webhook),
            range_problem(
                "energy_usd_per_mwh",
                self.energy_usd_per_mwh,
                0,
                config_tariffs.ENERGY_USD_PER_MWH_MAX,
            ),
            range_problem(
                "power_overhead_percent",
                self.power_overhead_percent,
                config_tariffs.OVERHEAD_PERCENT_MIN,
                config_tariffs.OVERHEAD_PERCENT_MAX,
            ),
            *scaling_problems(self),
            range_problem("moves_per_hour", self.moves_per_hour, 0, MOVES_PER_HOUR_MAX),
            range_problem(
                "reservation_wait_ms", self.reservation_wait_ms, 0, RESERVATION_WAIT_MS_MAX
            ),
            range_problem("reservation_ms", self.reservation_ms, 1_000, RESERVATION_MS_MAX),
            range_problem("jobs_kept", self.jobs_kept, JOBS_KEPT_MIN, JOBS_KEPT_MAX),
            choice_problem("log_level", self.log_level, LOG_LEVELS),
            choice_problem("log_format", self.log_format, LOG_FORMATS),
            self.port_file and path_problem("port_file", self.port_file),
        ]
        return [sentence for sentence in found if sentence]

    def tls(self) -> "Tls | None":
        """The three PEM files, or `None` without TLS."""
        from coordinator.transport import Tls  # brings grpc, which --help need not wait for

        return Tls(self.tls_cert, self.tls_key, self.tls_ca) if self.tls_cert else None

    def _metrics_problem(self) -> str | None:
        if not self.metrics_listen:
            return None
        return address_problem("metrics_listen", self.metrics_listen, port_min=0) or (
            _listen_problem(self.metrics_listen, self.tls())
        )

    def _lease_problem(self) -> str | None:
        shortest_ms = HEARTBEATS_PER_LEASE_MIN * self.heartbeat_interval_ms
        if self.lease_ms < shortest_ms:
            return (
                f"'lease_ms' is {self.lease_ms}, less than {HEARTBEATS_PER_LEASE_MIN} heartbeats "
                f"of {self.heartbeat_interval_ms} ms: one late heartbeat would cost a node its "
                f"jobs; make it at least {shortest_ms}"
            )
        return range_problem("lease_ms", self.lease_ms, 1, LEASE_MS_MAX)

    def suspicious_ms(self) -> int:
        """What `suspect_ms` comes to."""
        usual_ms = max(SUSPECT_MS_MIN, HEARTBEATS_TO_SUSPECT * self.heartbeat_interval_ms)
        return min(self.lease_ms, self.suspect_ms or usual_ms)

    def _suspect_problem(self) -> str | None:
        if self.suspect_ms == 0 or self.heartbeat_interval_ms < self.suspect_ms <= self.lease_ms:
            return None
        return (
            f"'suspect_ms' must be 0, or more than a heartbeat ({self.heartbeat_interval_ms} ms) "
            f"and at most the lease ({self.lease_ms} ms), not {self.suspect_ms}"
        )

    def _closed_grace_problem(self) -> str | None:
        if 0 <= self.closed_grace_ms <= self.lease_ms:
            return None
        return (
            f"'closed_grace_ms' must be 0 to the lease ({self.lease_ms} ms), after which the node "
            f"is lost anyway, not {self.closed_grace_ms}"
        )


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> Loaded[Config]:
    """File, then environment, then flags. Raises `ConfigError` with all that is wrong, and
    `SystemExit` 0 after printing the help."""
    return load_program(PROGRAM, arguments, environment)


def from_command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> Loaded[Config]:
    """The same for a program's start: prints what `--print-config` asks for, or what is wrong, and
    raises `SystemExit`."""
    return load_or_exit(PROGRAM, arguments, environment)


def prepare_directories(config: Config) -> None:
    """Make the state directory 0700, and tighten one of ours that others could enter; the store's
    directory is made when it is missing and left alone otherwise. Raises `ConfigError`."""
    found = [own_directory(config.state_directory)]
    store_directory = os.path.dirname(config.store_path)
    if not os.path.isdir(store_directory):
        found.append(own_directory(store_directory))
    problems = [sentence for sentence in dict.fromkeys(found) if sentence]
    if problems:
        raise ConfigError(problems)


def _complete(values: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """`values` with the store's place, which follows the state directory, and of its TLS files."""
    values = with_credentials(values, TLS_FIELDS, environment)
    values["capacity"] = {
        name: msgspec.convert(
            with_credentials(msgspec.structs.asdict(group), CREDENTIAL_FIELDS, environment),
            CapacityGroup,
        )
        for name, group in values.get("capacity", {}).items()
    }
    directory = values.get("state_directory", Config().state_directory)
    return {**values, "store_path": values.get("store_path") or f"{directory}/{STORE_NAME}"}


def _listen_problem(address: str, tls: "Tls | None") -> str | None:
    from coordinator.transport import TransportError, check_listen  # see `Config.tls`

    try:
        check_listen(address, tls)
    except TransportError as error:
        return str(error)
    return None


PROGRAM: Final = Program(
    name="baton-coordinator",
    prefix="BATON_COORDINATOR_",
    path=Path("/etc/baton/coordinator.toml"),
    fields=Config,
    complete=_complete,
)
