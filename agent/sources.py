"""Where a program's configuration comes from: TOML file, then environment, then flags.

Problem: a key that is misspelt and silently ignored runs a fleet on a default for months, and
"which value is in force, and why?" is asked at the worst time. So the fields are those of one
struct (`config.py`), which knows no other; the three sources are laid over its defaults in this
order; an unknown key is answered with the nearest right one; everything that is wrong is said at
once, in sentences that name the source; and `--print-config` prints each field with its source, as
a file that could be used. The environment is an argument here: `main.py` alone hands it in.

Coordinator and agent each have this file, word for word (a test compares them), because neither may
import the other.
"""

import argparse
import json
import os
import shlex
import stat
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    Final,
    Generic,
    NoReturn,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

EXIT_USAGE: Final = 2
PORT_MAX: Final = 65_535
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("auto", "json", "console")
# Below this likeness a suggestion would be a guess; "lissten" and "listen" are at 0.92.
LIKENESS_MIN: Final = 0.5

CREDENTIALS: Final = "$CREDENTIALS_DIRECTORY"
TLS_FIELDS: Final = ("tls_cert", "tls_key", "tls_ca")

BOOLEANS: Final = {"true": True, "false": False}

_METAVARS: Final[Mapping[object, str]] = {
    str: "TEXT",
    int: "NUMBER",
    bool: "true|false",
    list: "ITEM,ITEM",
    dict: "NAME=VALUE",
}
_KINDS: Final[Mapping[object, str]] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    list: "a list of texts",
    dict: "a table of texts, NAME=VALUE for each entry",
}


class Fields(Protocol):
    """What a configuration is: a msgspec Struct that can check itself."""

    def validate(self) -> list[str]:
        """What is wrong, as sentences that say what to change."""
        ...


Config = TypeVar("Config", bound=Fields)


def says(text: str) -> msgspec.Meta:
    """What a field means: unit, range, default and reason."""
    return msgspec.Meta(description=text)


@dataclass(frozen=True, slots=True)
class Program(Generic[Config]):
    """Whose configuration it is. `complete` gets the values that were given, and the environment,
    and returns them with defaults that depend on these."""

    name: str
    prefix: str
    path: Path
    fields: type[Config]
    complete: Callable[[dict[str, Any], Mapping[str, str]], dict[str, Any]]

    def flag(self, field: str) -> str:
        """`lease_ms` -> `--lease-ms`."""
        return "--" + field.replace("_", "-")

    def variable(self, field: str) -> str:
        """`lease_ms` -> `BATON_..._LEASE_MS`."""
        return self.prefix + field.upper()

    def types(self) -> dict[str, Any]:
        """Field -> type."""
        return get_type_hints(self.fields)

    def meanings(self) -> dict[str, str]:
        """Field -> what `says` says."""
        hints = get_type_hints(self.fields, include_extras=True)
        return {name: str(hint.__metadata__[0].description) for name, hint in hints.items()}


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Config]):
    """A configuration, where each of its fields came from, and whether to print it and leave."""

    config: Config
    sources: Mapping[str, str]
    print_config: bool = False


class ConfigError(Exception):
    """The configuration will not do. `sentences` say what to change, one for each problem."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("; ".join(sentences))
        self.sentences = tuple(sentences)


def load_or_exit(
    program: Program[Config], arguments: Sequence[str], environment: Mapping[str, str]
) -> Loaded[Config]:
    """`load` for a program's start: raises `SystemExit` 2 with the sentences on stderr, and 0 after
    `--help` and `--print-config`."""
    try:
        loaded = load(program, arguments, environment)
    except ConfigError as error:
        sys.stderr.writelines(f"{program.name}: {sentence}\n" for sentence in error.sentences)
        raise SystemExit(EXIT_USAGE) from error
    if loaded.print_config:
        sys.stdout.write(print_config(loaded))
        raise SystemExit(0)
    return loaded


def load(
    program: Program[Config], arguments: Sequence[str], environment: Mapping[str, str]
) -> Loaded[Config]:
    """File, then environment, then flags. Raises `ConfigError` with every problem found, and
    `SystemExit` 0 after printing the help."""
    problems: list[str] = []
    flags = _read_flags(program, arguments, problems)
    variables = _read_environment(program, environment, problems)
    path = flags.pop("config", variables.pop("config", None))
    show = bool(flags.pop("print_config", False))
    types = program.types()
    values: dict[str, Any] = {}
    sources = dict.fromkeys(types, "default")
    given = [(f"file {source}", *pair) for source, pair in _read_file(program, path, problems)]
    given += [(f"env {program.variable(name)}", name, text) for name, text in variables.items()]
    given += [(f"flag {program.flag(name)}", name, text) for name, text in flags.items()]
    for source, name, value in given:
        if name not in types:
            hint = _nearest(program, name, types)
            problems.append(f"{source}: there is no field '{name}'; {hint}")
            continue
        try:
            values[name] = _converted(value, types[name], as_text=not source.startswith("file"))
            sources[name] = source
        except ValueError as error:
            problems.append(f"{source}: '{name}' must be {error}")
    if problems:
        raise ConfigError(problems)
    config = msgspec.convert(program.complete(values, environment), program.fields)
    problems = config.validate()
    if problems:
        raise ConfigError(problems)
    return Loaded(config, sources, show)


def print_config(loaded: Loaded[Config]) -> str:
    """Every field as a line of TOML, with its source as a comment; the text is a valid file."""
    lines = [
        f"{name} = {toml_value(getattr(loaded.config, name))}  # {source}"
        for name, source in loaded.sources.items()
    ]
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    """A value of a field as TOML."""
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, msgspec.Struct):
        said = msgspec.structs.asdict(value)
        value = {name: item for name, item in said.items() if item is not None}
    if isinstance(value, dict):
        pairs = (f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    # A JSON string is a TOML string, but for DEL, which TOML wants escaped.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return text.encode("utf-8", "backslashreplace").decode()


class _Parser(argparse.ArgumentParser):
    """Answers a wrong flag with a sentence for the caller, not with a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version  # a megabyte, for who asks

        sys.stdout.write(f"{parser.prog}, version {version('gpu-baton')}\n")
        parser.exit()


def _read_flags(
    program: Program[Config], arguments: Sequence[str], problems: list[str]
) -> dict[str, Any]:
    parser = _Parser(
        prog=program.name,
        description=f"Configuration: {program.path}, then {program.prefix}* in the environment "
        "(the field's name in capitals), then these flags. The later wins.",
        epilog="Exit status: 2 when the configuration will not do; the sentences on stderr say "
        "what to change.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="PATH", help=f"The TOML file. Default: {program.path} when it exists."
    )
    parser.add_argument(
        "--print-config", action="store_true", help="Print what is in force, and from where."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="Print the version.")
    meanings = program.meanings()
    for name, hint in program.types().items():
        kind = get_origin(hint) or hint
        parser.add_argument(
            program.flag(name),
            action="append" if kind is dict else "store",
            metavar=_METAVARS[kind],
            help=meanings[name].replace("%", "%%"),
        )
    known, unknown = parser.parse_known_args(list(arguments))
    # The value of a misspelt flag is left over as well; naming the flag is enough.
    for item in [word for word in unknown if word.startswith("-")] or unknown:
        if item.startswith("-"):
            flag = item.partition("=")[0]
            names = (*meanings, "config", "print_config", "version", "help")
            flags = [program.flag(name) for name in names]
            hint = _nearest(program, flag, flags)
            problems.append(f"flag {flag}: there is no such flag; {hint}")
        else:
            problems.append(f"unexpected argument '{item}'; {program.name} takes flags only")
    return vars(known)


def _read_environment(
    program: Program[Config], environment: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    names = {program.variable(name): name for name in (*program.types(), "config")}
    found = {}
    for variable in sorted(environment):
        if variable in names:
            found[names[variable]] = environment[variable]
        elif variable.startswith(program.prefix):
            hint = _nearest(program, variable.upper(), names)
            problems.append(f"env {variable}: there is no such field; {hint}")
    return found


def _read_file(
    program: Program[Config], given: object, problems: list[str]
) -> list[tuple[Path, tuple[str, Any]]]:
    """The file's path and pairs. An empty path means no file; the default one may be missing."""
    if given == "" or (given is None and not program.path.exists()):
        return []
    path = program.path if given is None else Path(str(given))
    try:
        # Some editors mark UTF-8.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        problems.append(f"file {path}: cannot be read: {error.strerror}")
        return []
    except ValueError as error:  # not TOML, or not UTF-8
        problems.append(f"file {path}: is not TOML: {error}")
        return []
    return [(path, pair) for pair in values.items()]


def _converted(value: Any, hint: Any, *, as_text: bool) -> Any:
    """`value` as `hint`. Raises `ValueError` whose text completes the sentence "must be"."""
    kind, table = get_origin(hint) or hint, _table(hint)
    expected = f"a table of tables with {' and '.join(table)}" if table else _KINDS[kind]
    try:
        given = _from_text(value, kind) if as_text else value
        if table and as_text:
            given = {name: _from_toml(text) for name, text in given.items()}
        for name, entry in given.items() if table else ():
            _check_keys(name, entry, table)
        return msgspec.convert(given, hint)
    except _UnknownKey:
        raise
    except (msgspec.ValidationError, AttributeError, ValueError) as error:
        raise ValueError(f"{expected}, not {value!r}") from error


class _UnknownKey(ValueError):
    """In a table of a table; the text completes the sentence "must be"."""


def _table(hint: Any) -> tuple[str, ...]:
    """The keys of each of a field's tables, where it is a table of tables."""
    entry = get_args(hint)[1] if get_origin(hint) is dict else None
    return tuple(getattr(entry, "__struct_fields__", ()))


def _check_keys(name: str, entry: Any, known: Sequence[str]) -> None:
    for key in entry if isinstance(entry, dict) else ():
        if key not in known:
            hint = _did_you_mean(key, known) or f"it has {' and '.join(known)}"
            raise _UnknownKey(f"without '{key}' in '{name}'; {hint}")


def _from_toml(text: str) -> Any:
    """A value as TOML has it: `{ weight = 2 }`."""
    return tomllib.loads(f"value = {text}")["value"]


def _from_text(value: Any, kind: Any) -> Any:
    """A flag or variable as the type of its field; a table's flag comes once for each entry."""
    if kind is dict:
        words = value if isinstance(value, list) else shlex.split(value)
        pairs = [word.partition("=") for word in words]
        if not all(name and equals for name, equals, _ in pairs):
            raise ValueError("an entry without a name or '='")
        return {name: text for name, _, text in pairs}
    if not value.isprintable():  # line breaks, and lone surrogates from bytes that are not UTF-8
        raise ValueError("not one line of UTF-8")
    if kind is list:
        return value.replace(",", " ").split()
    if kind is bool and value in BOOLEANS:
        return BOOLEANS[value]
    return int(value) if kind is int else value


def _nearest(program: Program[Config], word: str, known: Iterable[str]) -> str:
    return _did_you_mean(word, known) or f"{program.name} --help lists them"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """Empty where nothing is like it."""
    import difflib  # only a mistake needs it, and nobody starts with one

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=LIKENESS_MIN)
    return f"did you mean '{near[0]}'?" if near else ""


# --- checks for `validate`: a sentence, or None when all is well ---------------------------------


def address_problem(name: str, address: str, *, port_min: int) -> str | None:
    """HOST:PORT, with brackets around an IPv6 address."""
    host, _, port = address.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    bare = ":" in host and not (host.startswith("[") and host.endswith("]"))
    if host and host.isprintable() and not bare and port_min <= number <= PORT_MAX:
        return None
    return f"'{name}' must be HOST:PORT with a port of {port_min} to {PORT_MAX}, not '{address}'"


def range_problem(name: str, value: int, low: int, high: int) -> str | None:
    """Both ends belong to the range."""
    return None if low <= value <= high else f"'{name}' must be {low} to {high}, not {value}"


def path_problem(name: str, path: str) -> str | None:
    """Absolute: a program's working directory is nothing to rely on."""
    if path.startswith("/") and path.isprintable():
        return None
    return f"'{name}' must be an absolute path, not '{path}'"


def choice_problem(name: str, value: str, choices: tuple[str, ...]) -> str | None:
    """One of `choices`, of which one may be empty."""
    if value in choices:
        return None
    named = ", ".join(choice for choice in choices if choice)
    return f"'{name}' must be one of {named}{', or empty' * ('' in choices)}, not '{value}'"


def with_credentials(
    values: Mapping[str, Any], names: Iterable[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """`values` with the directory of this service's credentials (systemd.exec(5),
    LoadCredential=) for a leading `$CREDENTIALS_DIRECTORY` of those `names`. Keys then belong to
    root, and this program gets copies in memory that nobody else can read."""
    found = dict(values)
    directory = environment.get("CREDENTIALS_DIRECTORY", "")
    for name in names:
        if directory and str(found.get(name, "")).startswith(CREDENTIALS):
            found[name] = directory + found[name].removeprefix(CREDENTIALS)
    return found


def tls_problem(*paths: str) -> str | None:
    """All three files, or none; and where they are credentials, systemd must have said where."""
    if any(path.startswith(CREDENTIALS) for path in paths):
        return (
            f"{CREDENTIALS} is set by systemd alone, for a unit with LoadCredential=: start the "
            "service, or give the paths of the TLS files"
        )
    if all(paths) or not any(paths):
        return None
    return "'tls_cert', 'tls_key' and 'tls_ca' belong together: give all three or none"


def own_directory(path: str) -> str | None:
    """Make `path` a directory that only this user can enter; a looser one of ours is tightened."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            mode = stat.S_IMODE(status.st_mode)
            if mode & stat.S_ISVTX or os.path.realpath(path) == "/":
                return f"{path} is everybody's: choose a directory of its own below it"
            if mode != 0o700 and status.st_uid == os.geteuid():
                os.fchmod(descriptor, 0o700)
            elif mode & 0o077:
                return (
                    f"{path} belongs to user {status.st_uid} and others can enter it "
                    f"(mode {mode:04o}): give it to user {os.geteuid()}, or choose another one"
                )
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"the directory {path} cannot be used: {error.strerror}"
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return f"the directory {path} is not writable for user {os.geteuid()}"
    return None
