"""The options that every command has, and the ways in which a command ends badly.

Problem: people write `baton --json jobs` and `baton jobs --json`, and mean the same. Click gives an
option to one level only, so `common_options` puts the same options on the group and on each
command, and both write into one `Settings`; what stands later on the line wins. Under a command
only `--json` is listed in the help, the connection's options are listed once, under `baton --help`.

The coordinator runs commands for whoever can reach it. An address that is not loopback therefore
needs mutual TLS, and is refused without it before a byte is sent.
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from coordinator.cli.client import Client

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
# What a shell reports for a program that SIGINT or SIGPIPE ended.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

ADDRESS_DEFAULT = "127.0.0.1:7070"
# Long enough for a coordinator that is just recovering its store, short enough for somebody who
# waits at a terminal.
TIMEOUT_S_DEFAULT = 30.0
# A day: more is a mistyped unit.
TIMEOUT_S_MAX = 86_400.0
# int64 on the wire.
JOB_ID_MAX = 2**63 - 1


class TrialName(NamedTuple):
    """A trial by its index in the array whose first job is `array_id`: `12_3`, as Slurm has it."""

    array_id: int
    array_index: int


class JobId(click.ParamType[int | TrialName]):
    """A job's number, or a trial's name, which Python would take for a number as well."""

    name = "job number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | TrialName:
        if named := re.fullmatch("([0-9]{1,18})_([0-9]{1,9})", str(value)):
            return TrialName(int(named[1]), int(named[2]))
        if not re.fullmatch("[0-9]{1,19}", str(value)) or not 0 < int(value) <= JOB_ID_MAX:
            self.fail(f"{str(value)!r} is not a valid {self.name}.", param, ctx)
        return int(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The newest jobs, whatever became of them."""
        from coordinator.cli.completion import job_ids

        return job_ids()(ctx, param, incomplete)


JOB_ID = JobId()

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


class CommandFailed(Exception):
    """The command was refused or failed; the text is one sentence for stderr, `exit_code` is 1, 2
    or 3."""

    def __init__(self, sentence: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class BadInput(CommandFailed):
    """A file that the user gave is wrong; nothing was sent. One sentence that names the file and
    the place."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, EXIT_USAGE)


@dataclass(slots=True)
class Settings:
    """Where the coordinator is, how to speak to it, and how to answer. `timeout_s` bounds one
    answer."""

    coordinator: str = ADDRESS_DEFAULT
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    timeout_s: float = TIMEOUT_S_DEFAULT
    as_json: bool = False

    def tls_doubt(self) -> str:
        """What is wrong with the TLS files, as far as it can be seen here; empty without them."""
        from coordinator import https
        from coordinator.transport import Tls, TransportError

        if not (self.tls_cert and self.tls_key and self.tls_ca):
            return ""
        files = Tls(str(self.tls_cert), str(self.tls_key), str(self.tls_ca))
        try:
            return https.doubt(files, serves=False)
        except TransportError as error:
            return str(error)

    def check(self) -> None:
        """Raises `click.UsageError` with a sentence when these settings cannot be used together."""
        host, colon, port = self.coordinator.rpartition(":")
        if not (
            host
            and colon
            and "/" not in host
            and port.isascii()
            and port.isdigit()
            and 0 < int(port) < 65536
        ):
            raise click.UsageError(
                f"--coordinator must be HOST:PORT, like {ADDRESS_DEFAULT}; got {self.coordinator!r}"
            )
        if not 0 < self.timeout_s <= TIMEOUT_S_MAX:
            raise click.UsageError(
                f"--timeout-s must be more than 0 and at most {TIMEOUT_S_MAX:g}; "
                f"got {self.timeout_s:g}"
            )
        given = [self.tls_cert, self.tls_key, self.tls_ca]
        if any(given) and not all(given):
            raise click.UsageError(
                "--tls-cert, --tls-key and --tls-ca belong together: give all three or none"
            )
        if not any(given) and not is_loopback(host):
            raise click.UsageError(
                f"{self.coordinator} is not on this machine, and Baton speaks to other machines "
                "only with TLS: give --tls-cert, --tls-key and --tls-ca"
            )


def is_loopback(host: str) -> bool:
    """Whether `host` can only mean this machine: localhost, 127.0.0.0/8 or ::1 (with or without
    brackets)."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False  # a name, and nobody knows where it leads


def settings_of(context: click.Context) -> Settings:
    """The settings of this invocation, made by whichever level asks first."""
    settings: Settings = context.ensure_object(Settings)
    return settings


def connect(context: click.Context) -> "Client":
    """A client for the coordinator that the settings name; use it as a context manager."""
    # grpc takes as long to import as everything else together
    from coordinator.cli.client import Client

    return Client(settings_of(context))


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keep what was really given: the command's own default must not undo what stood before the
    command."""
    name = parameter.name
    assert name is not None
    settings = settings_of(context)
    source = context.get_parameter_source(name)
    if source not in (click.core.ParameterSource.DEFAULT, None):
        setattr(settings, name, value)


def _connection_options(*, hidden: bool) -> list[Callable[[_Decorated], _Decorated]]:
    """The connection's options. A command's copies read no environment: the group's have done that
    already."""

    def option(name: str, variable: str | None, **attributes: Any) -> Any:
        return click.option(
            name,
            callback=_store,
            expose_value=False,
            hidden=hidden,
            envvar=None if hidden else variable,
            show_envvar=not hidden and variable is not None,
            **attributes,
        )

    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    return [
        option(
            "--coordinator",
            "BATON_COORDINATOR",
            metavar="HOST:PORT",
            help=f"Where the coordinator is.  [default: {ADDRESS_DEFAULT}]",
        ),
        option("--tls-cert", "BATON_TLS_CERT", type=file, help="Your certificate, PEM."),
        option("--tls-key", "BATON_TLS_KEY", type=file, help="Its private key, PEM."),
        option("--tls-ca", "BATON_TLS_CA", type=file, help="The authority of the fleet, PEM."),
        option(
            "--timeout-s",
            None,
            type=float,
            metavar="SECONDS",
            help=f"Wait this long for one answer.  [default: {TIMEOUT_S_DEFAULT:g}]",
        ),
    ]


def _json_option() -> Callable[[_Decorated], _Decorated]:
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        default=False,
        callback=_store,
        expose_value=False,
        help="Answer in JSON, for programs.",
    )


def common_options(command: _Decorated) -> _Decorated:
    """Give a command the options that all commands have; a trial's name becomes its job's id."""

    @wraps(command)
    def function(*arguments: Any, **named: Any) -> Any:
        if isinstance(named.get("job_id"), TrialName):
            named["job_id"] = _trial_id(click.get_current_context(), named["job_id"])
        if job_ids := named.get("job_ids"):
            context = click.get_current_context()
            named["job_ids"] = [
                _trial_id(context, each) if isinstance(each, TrialName) else each
                for each in job_ids
            ]
        return command(*arguments, **named)

    return _with_options(cast("_Decorated", function))


def _trial_id(context: click.Context, name: TrialName) -> int:
    """Ids of trials follow one another in the order of their indices."""
    from coordinator.core import arrays

    with connect(context) as client:
        first = client.job(name.array_id)
    if first.trial is None or first.trial.array_job_id != first.id:
        raise CommandFailed(f"job {first.id} is not the first of an array; give a job number")
    indices = arrays.parse(first.spec.array).indices
    if name.array_index not in indices:
        raise CommandFailed(
            f"array {first.id} is {first.spec.array}; it has no index {name.array_index}"
        )
    return first.id + indices.index(name.array_index)


def _with_options(function: _Decorated) -> _Decorated:
    for option in [_json_option(), *reversed(_connection_options(hidden=True))]:
        function = option(function)
    return function


def group_options(function: _Decorated) -> _Decorated:
    """Give the group itself the same options, listed and with their environment variables."""
    for option in [_json_option(), *reversed(_connection_options(hidden=False))]:
        function = option(function)
    return function
