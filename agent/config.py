"""The agent's configuration: every field with its unit, default and reason.

Problem: a field without a unit is set wrong by a factor of a thousand, and a default without a
reason is never dared to be changed. So the fields stand here once, each with what it means;
`sources.py` reads them from file, environment and flags, `--help` and `systemd/agent.toml` say the
same words, and `validate` answers in sentences, also about fields that must fit one another.
"""

import importlib.util
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from agent.sources import (
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
from agent.sources import load as load_program

if TYPE_CHECKING:
    from agent.transport import Tls

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

ALL_GPUS: Final = "all"
# What SIGHUP takes over. TLS files need no signal: they are read when a connection begins.
RELOADABLE: Final = frozenset({"log_level", "restart_absence_ms", "telemetry_rate"})
TELEMETRY_RATES: Final = ("off", "slow", "normal", "watch")

MPS_CHOICES: Final = ("auto", "off")
NODE_CHARACTERS_MAX: Final = 64  # the wire's limit, and Linux's for a host name
SOCKET_PATH_BYTES_MAX: Final = 100  # sun_path holds 108 (unix(7)); leaves room for temporary names
SOCKET_NAME: Final = "trainers.sock"  # of the names in the runtime directory, the longest
SLAB_MEMORY_PERCENT_MAX: Final = 90  # the trainers themselves, and the agent, live in the rest
SAMPLE_INTERVAL_MS_MIN: Final = 100  # NVML's own counters change no faster
SAMPLE_INTERVAL_MS_MAX: Final = 60_000  # older figures tell nothing of a running step
HANG_FLOOR_MS_MAX: Final = 86_400_000  # a day; who wants no limits says so in the job
JOB_LOG_BYTES_MAX_MIN: Final = 64 * 1024**2  # one full log; less keeps nothing that is over
JOB_LOG_BYTES_MAX_MAX: Final = 1024**4  # a whole disk; logs are for people to read
ABSENCE_MS_MAX: Final = 600_000  # the coordinator believes no longer absence; that is a drain

# What trainers get of the agent's own environment; nothing else leaks into a job. A job's own
# variables win over these.
INHERITED_VARIABLES: Final = (
    "PATH",  # programs that a job's script calls
    "HOME",  # where libraries keep caches and settings
    "LANG",  # the encoding of file names and output
    "LD_LIBRARY_PATH",  # where a box keeps its CUDA libraries
    "OMP_NUM_THREADS",  # on a small box, the administrator's limit on threads
    "HF_HOME",  # models that the box has already
    "HF_HUB_OFFLINE",  # a box without a way out must not wait for one
)
# For an agent that was started without them: a script finds its tools, and text is UTF-8.
FALLBACK_VARIABLES: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}

# The one variable of Baton's that people set: 0 leaves unmodified scripts alone.
HOOK_VARIABLE: Final = "BATON_HOOK"

_NODE: Final = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_RESERVED_NODE: Final = "shared"  # stands for the shared directory where a replica's node is named
_GPU: Final = re.compile(r"(GPU|MIG)-[0-9A-Za-z/-]+")
_SHARED_URL: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]+)?|file:///[^?#]+")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _host_node() -> str:
    """The host's name as a node id: lower case, and a hyphen for what an id cannot hold."""
    name = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower())
    return name[:NODE_CHARACTERS_MAX].strip(".-") or "node"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator may set. The text beside a field is its help, and its comment in
    `systemd/agent.toml`."""

    # fmt: off
    node: Annotated[str, says(
        "Id of this node: lower-case letters, digits, dots and hyphens, at most 64. Default: the "
        "host's name, which people already know."
    )] = msgspec.field(default_factory=_host_node)
    coordinator: Annotated[str, says(
        "HOST:PORT of the coordinator. The default is for trying things out on one machine."
    )] = "127.0.0.1:7070"
    listen: Annotated[str, says(
        "HOST:PORT where other agents fetch checkpoints and the coordinator fetches logs. Port 0 "
        "takes a free one; anything but loopback needs TLS."
    )] = "127.0.0.1:0"
    chunk_port: Annotated[int, says(
        "Port on the host of listen where other agents move checkpoints over HTTP, or HTTPS with "
        "TLS, 0 to 65535. Default (0): a free one; a firewall wants one that it knows. Without a "
        "way to it transfers go over listen, slower."
    )] = 0
    advertise: Annotated[str, says(
        "HOST:PORT under which others reach that service; port 0 stands for the bound one. "
        "Default (empty): as listen, which others can dial unless it says 'every address'."
    )] = ""
    state_directory: Annotated[str, says(
        "Journal, checkpoints and logs; made with mode 0700. Give it the fast, large disk."
    )] = "/var/lib/baton/agent"
    runtime_directory: Annotated[str, says(
        "Sockets of trainers; made with mode 0700. Short, because the path of a socket has to stay "
        "under 100 bytes."
    )] = "/run/baton/agent"
    shared_directory: Annotated[str, says(
        "A directory that all nodes mount, for replicas; it must exist. Default (empty): none, "
        "replicas go to peers."
    )] = ""
    shared_url: Annotated[str, says(
        "Instead of shared_directory an object store, s3://BUCKET/PREFIX, which needs the extra "
        "'objects' and takes credentials and endpoint from where AWS's tools do; or file:///PATH, "
        "the same as shared_directory. The bucket must not expire objects by age: new checkpoints "
        "share old chunks. Default (empty): none."
    )] = ""
    gpus: Annotated[list[str], says(
        "UUIDs of the GPUs that jobs may use, as `nvidia-smi -L` prints them; an index would name "
        "another card after a repair. Default: all; an empty list: none."
    )] = msgspec.field(default_factory=lambda: [ALL_GPUS])
    trainer_python: Annotated[str, says(
        "Interpreter of the built-in trainers, an absolute path. Default: the agent's own; give "
        "another when torch is installed elsewhere."
    )] = msgspec.field(default_factory=lambda: sys.executable)
    trainer_environment: Annotated[dict[str, str], says(
        "Variables that every trainer starts with, added to those kept of the agent's own "
        "environment: PATH, HOME, LANG, LD_LIBRARY_PATH, OMP_NUM_THREADS, HF_HOME and "
        "HF_HUB_OFFLINE. A job's own win."
    )] = msgspec.field(default_factory=dict)
    warm_start: Annotated[bool, says(
        "Keep a process that has imported torch and transformers, from which built-in trainers are "
        "forked: seconds less after each handoff, for some 400 MB of memory of which trainers "
        "share most. Without those libraries it is not there."
    )] = True
    slab_memory_percent: Annotated[int, says(
        "Share of the memory that the host has available, 0 to 90, from which a trainer that asks "
        "gets room for captures of its state: checkpoints then hardly stop it, and survive it. "
        "Half leaves the rest for page cache; 0: every checkpoint goes through files."
    )] = 50
    sample_interval_ms: Annotated[int, says(
        "Milliseconds between readings of the GPUs, 100 to 60000. Once a second shows a stalled "
        "input pipeline and costs next to nothing."
    )] = 1_000
    kernel_log: Annotated[str, says(
        "Where the kernel's log is read for the driver's errors (XIDs), beside what NVML tells of "
        "them. It needs the right to read it; without it NVML is the only witness. Empty: not."
    )] = "/dev/kmsg"
    xid_table: Annotated[str, says(
        "TOML file that says what follows from each XID, in place of the agent's own table, which "
        "is NVIDIA's catalogue of the day that it names. Default (empty): our own."
    )] = ""
    telemetry_rate: Annotated[str, says(
        "off, slow, normal or watch: how often the driver is asked, whose lock trainers wait for. "
        "Normal reads figures each sample_interval_ms, processes and errors every ten seconds, "
        "inventory once a minute; slow a tenth of it, watch five times more. SIGHUP takes it over."
    )] = "normal"
    telemetry_pcie_throughput: Annotated[bool, says(
        "Read with the inventory what each GPU sends and receives over PCIe. The driver sleeps 20 "
        "ms for each direction while it measures, and trainers wait for its lock."
    )] = False
    hang_floor_ms: Annotated[int, says(
        "Milliseconds that a section of a training (a step, an evaluation) may take in any case, "
        "1000 to 86400000, before it is called hung; what it usually takes is learned. Two minutes "
        "pass over a file server's pause, and cost less than most restarts."
    )] = 120_000
    metrics_listen: Annotated[str, says(
        "HOST:PORT where Prometheus reads /metrics. Port 0 takes a free one, which the log names; "
        "anything but loopback needs TLS, and then its scraper needs a certificate. Default "
        "(empty): nowhere."
    )] = ""
    metrics_dcgm_names: Annotated[bool, says(
        "Show the GPUs under the names and units of NVIDIA's DCGM exporter as well, for dashboards "
        "that are there already."
    )] = False
    tls_cert: Annotated[str, says(
        "PEM file with this agent's certificate chain; as the other two, it may begin with "
        "$CREDENTIALS_DIRECTORY, where a service finds what LoadCredential= names. Default "
        "(empty): no TLS, loopback only."
    )] = ""
    tls_key: Annotated[str, says("PEM file with its private key.")] = ""
    tls_ca: Annotated[str, says(
        "PEM file with the authority whose certificates the fleet trusts."
    )] = ""
    peers: Annotated[list[str], says(
        "Names in certificates, * for any part, that may read and send checkpoints and read logs "
        "here: the coordinator's and those of all nodes. Default (empty): all of the authority."
    )] = msgspec.field(default_factory=list)
    log_level: Annotated[str, says(
        "debug, info, warning or error: the least that is logged. SIGHUP takes it over."
    )] = "info"
    log_format: Annotated[str, says(
        "json (one object a line, for machines), console (for people), or auto: console when "
        "stderr is a terminal, entries with fields of their own when it is systemd's journal."
    )] = "auto"
    job_units: Annotated[bool, says(
        "Run each job as a service of systemd, held to its memory and its GPUs, where "
        "baton-launcher.socket is there. false: in the agent's own unit, without limits."
    )] = True
    mps: Annotated[str, says(
        "auto or off: whether jobs that share a GPU run under NVIDIA's MPS where "
        "nvidia-cuda-mps-control is there. It holds them to their memory, and one's fault can end "
        "all of that GPU. Not for jobs in units of their own, since it serves one user."
    )] = "auto"
    job_log_bytes_max: Annotated[int, says(
        "Bytes that the output of all jobs on this node may take, 64 MiB to 1 TiB. Each job keeps "
        "its newest 64 MiB; the logs of finished ones go first, the oldest before the others. "
        "Default: 4 GiB, which 64 full logs fit in."
    )] = 4 * 1024**3
    restart_absence_ms: Annotated[int, says(
        "Milliseconds of absence announced at SIGTERM, 0 to 600000; the node's jobs stay its own "
        "so long. A minute covers an upgrade. SIGHUP takes it over."
    )] = 60_000
    port_file: Annotated[str, says(
        "File that gets the bound HOST:PORT once this agent serves, for tools that let it choose "
        "its port. Default (empty): none."
    )] = ""

    # fmt: on

    def validate(self) -> list[str]:
        """What is wrong, as sentences that say what to change; empty when all is well."""
        tls = tls_problem(self.tls_cert, self.tls_key, self.tls_ca)
        found = [
            self._node_problem(),
            tls,
            address_problem("coordinator", self.coordinator, port_min=1)
            or (None if tls else self._dial_problem()),
            address_problem("listen", self.listen, port_min=0)
            or (None if tls else _listen_problem(self.listen, self.tls())),
            self._metrics_problem(),
            range_problem("chunk_port", self.chunk_port, 0, 65_535),
            self._advertise_problem(),
            self._shared_problem(),
            path_problem("state_directory", self.state_directory),
            path_problem("runtime_directory", self.runtime_directory),
            self._socket_problem(),
            path_problem("trainer_python", self.trainer_python),
            *self._gpu_problems(),
            *self._environment_problems(),
            range_problem(
                "slab_memory_percent", self.slab_memory_percent, 0, SLAB_MEMORY_PERCENT_MAX
            ),
            range_problem(
                "sample_interval_ms",
                self.sample_interval_ms,
                SAMPLE_INTERVAL_MS_MIN,
                SAMPLE_INTERVAL_MS_MAX,
            ),
            range_problem("hang_floor_ms", self.hang_floor_ms, 1_000, HANG_FLOOR_MS_MAX),
            choice_problem("telemetry_rate", self.telemetry_rate, TELEMETRY_RATES),
            choice_problem("log_level", self.log_level, LOG_LEVELS),
            choice_problem("log_format", self.log_format, LOG_FORMATS),
            choice_problem("mps", self.mps, MPS_CHOICES),
            range_problem(
                "job_log_bytes_max",
                self.job_log_bytes_max,
                JOB_LOG_BYTES_MAX_MIN,
                JOB_LOG_BYTES_MAX_MAX,
            ),
            range_problem("restart_absence_ms", self.restart_absence_ms, 0, ABSENCE_MS_MAX),
        ]
        for name in ("shared_directory", "port_file", "kernel_log", "xid_table"):
            found.append(getattr(self, name) and path_problem(name, getattr(self, name)))
        return list(dict.fromkeys(sentence for sentence in found if sentence))

    def tls(self) -> "Tls | None":
        """The three PEM files, or `None` without TLS."""
        from agent.transport import Tls  # brings grpc, which --help need not wait for

        return Tls(self.tls_cert, self.tls_key, self.tls_ca) if self.tls_cert else None

    def shared_place(self) -> str:
        """Where shared replicas go: a directory, an `s3://` URL, or nowhere (empty)."""
        return self.shared_directory or self.shared_url.removeprefix("file://")

    def allowed_gpus(self) -> tuple[str, ...] | None:
        """UUIDs that jobs may use; `None` means all."""
        return None if self.gpus == [ALL_GPUS] else tuple(self.gpus)

    def advertised(self, bound_port: int) -> str:
        """The address to tell others, once the service is bound to `bound_port`."""
        host, _, port = (self.advertise or self.listen).rpartition(":")
        return f"{host}:{bound_port if int(port) == 0 else port}"

    def _node_problem(self) -> str | None:
        fits = len(self.node) <= NODE_CHARACTERS_MAX and _NODE.fullmatch(self.node)
        if fits and self.node != _RESERVED_NODE:
            return None
        return (
            f"'node' must be 1 to {NODE_CHARACTERS_MAX} of a-z, 0-9, '.' and '-', with a letter "
            f"or digit at both ends, and not '{_RESERVED_NODE}'; it is '{self.node}'"
        )

    def _dial_problem(self) -> str | None:
        if _listen_problem(self.coordinator, self.tls()) is None:
            return None
        return (
            f"the coordinator at {self.coordinator} is not on this machine, and an agent obeys one "
            "only under mutual TLS: give --tls-cert, --tls-key and --tls-ca"
        )

    def _metrics_problem(self) -> str | None:
        if not self.metrics_listen:
            return None
        return address_problem("metrics_listen", self.metrics_listen, port_min=0) or (
            _listen_problem(self.metrics_listen, self.tls())
        )

    def _advertise_problem(self) -> str | None:
        if self.advertise:
            return address_problem("advertise", self.advertise, port_min=0)
        if self.listen.rpartition(":")[0] in ("0.0.0.0", "[::]", "::"):  # noqa: S104 - no bind
            return f"nobody can dial {self.listen}: say in 'advertise' how others reach this node"
        return None

    def _shared_problem(self) -> str | None:
        if self.shared_directory and self.shared_url:
            return "'shared_directory' and 'shared_url' say the same thing: give one of them"
        if not self.shared_url or _SHARED_URL.fullmatch(self.shared_url):
            return None
        return (
            "'shared_url' must be s3://BUCKET, s3://BUCKET/PREFIX or file:///PATH, not "
            f"'{self.shared_url}'"
        )

    def _socket_problem(self) -> str | None:
        path = os.path.join(self.runtime_directory, SOCKET_NAME)
        size = len(os.fsencode(path))
        if size < SOCKET_PATH_BYTES_MAX:
            return None
        return (
            f"'runtime_directory' is too long: {path} has {size} bytes, and the path of a socket "
            f"must have fewer than {SOCKET_PATH_BYTES_MAX}"
        )

    def _gpu_problems(self) -> list[str]:
        if self.gpus == [ALL_GPUS]:
            return []
        return [
            f"'gpus' must be ['{ALL_GPUS}'] or UUIDs as `nvidia-smi -L` prints them (GPU-... or "
            f"MIG-...), and has '{gpu}'"
            for gpu in self.gpus
            if not _GPU.fullmatch(gpu)
        ]

    def _environment_problems(self) -> list[str]:
        found = []
        for name, value in self.trainer_environment.items():
            if not _VARIABLE.fullmatch(name) or "\0" in value:
                found.append(f"'trainer_environment' has '{name}', which no environment can hold")
            elif name.startswith("BATON_") and name != HOOK_VARIABLE:
                found.append(f"'trainer_environment' has '{name}': the agent sets BATON_* itself")
        return found


def prepare_directories(config: Config) -> None:
    """Make state and runtime directory, 0700; an existing one of ours that others could enter is
    tightened. A shared directory must exist already: one that is made because its mount is missing
    would fill the local disk. Raises `ConfigError`."""
    found = [own_directory(config.state_directory), own_directory(config.runtime_directory)]
    place = config.shared_place()
    if place.startswith("/") and not os.path.isdir(place):
        found.append(f"the shared directory {place} is missing: mount or make it")
    if place.startswith("s3://") and importlib.util.find_spec("s3fs") is None:
        found.append(f"{place} needs the extra 'objects': pip install 'gpu-baton[objects]'")
    problems = [sentence for sentence in dict.fromkeys(found) if sentence]
    if problems:
        raise ConfigError(problems)


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> Loaded[Config]:
    """File, then environment, then flags. Raises `ConfigError` with all that is wrong, and
    `SystemExit` 0 after printing the help."""
    return load_program(PROGRAM, arguments, environment)


def from_command_line(arguments: Sequence[str], environment: Mapping[str, str]) -> Loaded[Config]:
    """The same for a program's start: prints what `--print-config` asks for, or what is wrong, and
    raises `SystemExit`."""
    return load_or_exit(PROGRAM, arguments, environment)


def _complete(values: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """`values` with what trainers inherit below the variables that were given."""
    inherited = {name: environment[name] for name in INHERITED_VARIABLES if name in environment}
    given = values.get("trainer_environment", {})
    values = with_credentials(values, TLS_FIELDS, environment)
    return {**values, "trainer_environment": {**FALLBACK_VARIABLES, **inherited, **given}}


def _listen_problem(address: str, tls: "Tls | None") -> str | None:
    from agent.transport import TransportError, check_listen  # brings grpc; see `Config.tls`

    try:
        check_listen(address, tls)
    except TransportError as error:
        return str(error)
    return None


PROGRAM: Final = Program(
    name="baton-agent",
    prefix="BATON_AGENT_",
    path=Path("/etc/baton/agent.toml"),
    fields=Config,
    complete=_complete,
)
