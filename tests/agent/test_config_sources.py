"""File, environment, flags: one suite for both programs, whose loaders are the same text."""

import dataclasses
import itertools
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import agent.config
import agent.sources
import coordinator.config
import coordinator.sources

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Side:
    """One program, as its tests see it."""

    config: Any
    sources: Any
    sample: Path

    @property
    def prefix(self) -> str:
        return str(self.config.PROGRAM.prefix)

    def refusals(self, arguments: list[str], environment: dict[str, str]) -> list[str]:
        with pytest.raises(self.config.ConfigError) as caught:
            self.config.load(arguments, environment)
        return list(caught.value.sentences)


SIDES = {
    "agent": Side(agent.config, agent.sources, ROOT / "systemd/agent.toml"),
    "coordinator": Side(coordinator.config, coordinator.sources, ROOT / "systemd/coordinator.toml"),
}


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> Side:
    return SIDES[request.param]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Writes a configuration file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "baton.toml"
        path.write_text(text)
        return str(path)

    return write


def test_keys_may_be_credentials_of_a_service(side: Side, write: Callable[[str], str]) -> None:
    names = ("tls_cert", "tls_key", "tls_ca")
    path = write("".join(f'{name} = "$CREDENTIALS_DIRECTORY/{name}.pem"\n' for name in names))
    loaded = side.config.load(["--config", path], {"CREDENTIALS_DIRECTORY": "/run/credentials/x"})
    files = tuple(getattr(loaded.config, name) for name in names)
    assert files == tuple(f"/run/credentials/x/{name}.pem" for name in names)
    assert side.refusals(["--config", path], {}) == [
        "$CREDENTIALS_DIRECTORY is set by systemd alone, for a unit with LoadCredential=: start "
        "the service, or give the paths of the TLS files"
    ]


def test_flags_win_over_environment_over_file(side: Side, write: Callable[[str], str]) -> None:
    layers = {"file": "127.0.0.1:1", "env": "127.0.0.1:2", "flag": "127.0.0.1:3"}
    for present in itertools.product([False, True], repeat=3):
        names = [name for name, is_there in zip(layers, present, strict=True) if is_there]
        text = f'listen = "{layers["file"]}"' if "file" in names else ""
        path = write(text)
        variables = {side.prefix + "LISTEN": layers["env"]} if "env" in names else {}
        flags = ["--listen", layers["flag"]] if "flag" in names else []
        loaded = side.config.load(["--config", path, *flags], variables)
        told = {
            "file": f"file {path}",
            "env": f"env {side.prefix}LISTEN",
            "flag": "flag --listen",
        }
        expected = layers[names[-1]] if names else side.config.Config().listen
        assert loaded.config.listen == expected
        assert loaded.sources["listen"] == (told[names[-1]] if names else "default")


def test_the_version_is_said(side: Side, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        side.refusals(["--version"], {})
    assert (ended.value.code, capsys.readouterr().out.split(", version ")[0]) == (
        0,
        side.config.PROGRAM.name,
    )


def test_a_misspelt_key_is_answered_with_the_right_one(
    side: Side, write: Callable[[str], str]
) -> None:
    path = write('\ufefflog-level = "info"\n[tls]\nca = "x"\n')
    sentences = side.refusals(["--config", path, "--lissten", "x"], {side.prefix + "LOG_LEVL": "x"})
    assert sentences == [
        "flag --lissten: there is no such flag; did you mean '--listen'?",
        f"env {side.prefix}LOG_LEVL: there is no such field; "
        f"did you mean '{side.prefix}LOG_LEVEL'?",
        f"file {path}: there is no field 'log-level'; did you mean 'log_level'?",
        f"file {path}: there is no field 'tls'; did you mean 'tls_ca'?",
    ]


def test_a_key_like_no_other_is_answered_with_the_help(side: Side) -> None:
    (sentence,) = side.refusals(["--config", "", "--xyzzy=1"], {})
    name = side.config.PROGRAM.name
    assert sentence == f"flag --xyzzy: there is no such flag; {name} --help lists them"


def test_flags_are_not_guessed_from_their_beginning(side: Side) -> None:
    (sentence,) = side.refusals(["--config", "", "--log-form", "json"], {})
    assert sentence == "flag --log-form: there is no such flag; did you mean '--log-format'?"


def test_an_argument_that_is_no_flag(side: Side) -> None:
    (sentence,) = side.refusals(["--config", "", "listen"], {})
    assert sentence == f"unexpected argument 'listen'; {side.config.PROGRAM.name} takes flags only"
    (sentence,) = side.refusals(["--listen"], {})
    assert sentence == "argument --listen: expected one argument"


def test_wrong_types_name_their_source(side: Side, write: Callable[[str], str]) -> None:
    number = "sample_interval_ms" if side.sources is agent.sources else "lease_ms"
    path = write(f'{number} = "1000"\nlisten = 7070\nlog_level = true\n')
    assert side.refusals(["--config", path], {}) == [
        f"file {path}: '{number}' must be a whole number, not '1000'",
        f"file {path}: 'listen' must be text, not 7070",
        f"file {path}: 'log_level' must be text, not True",
    ]
    assert side.refusals(["--config", ""], {side.prefix + number.upper(): "1s"}) == [
        f"env {side.prefix}{number.upper()}: '{number}' must be a whole number, not '1s'"
    ]
    assert side.refusals(["--config", "", "--listen", "a\udcff"], {})[0].startswith(
        "flag --listen: 'listen' must be text, not "
    )


def test_yes_and_no_are_true_and_false(write: Callable[[str], str]) -> None:
    side = SIDES["agent"]
    assert side.refusals(["--config", write("warm_start = 1\n")], {})[0].endswith(
        "'warm_start' must be true or false, not 1"
    )
    assert side.refusals(["--config", ""], {"BATON_AGENT_WARM_START": "yes"}) == [
        "env BATON_AGENT_WARM_START: 'warm_start' must be true or false, not 'yes'"
    ]
    loaded = agent.config.load(["--config", "", "--warm-start", "false"], {})
    assert loaded.config.warm_start is False


def test_lists_and_tables_name_their_source(write: Callable[[str], str]) -> None:
    side = SIDES["agent"]
    path = write("gpus = [0]\n[trainer_environment]\nA = 1\n")
    assert side.refusals(["--config", path], {}) == [
        f"file {path}: 'gpus' must be a list of texts, not [0]",
        f"file {path}: 'trainer_environment' must be a table of texts, NAME=VALUE for each entry, "
        "not {'A': 1}",
    ]
    for bad in ("A", "=1", "A='"):
        variables = {"BATON_AGENT_TRAINER_ENVIRONMENT": bad}
        assert "NAME=VALUE for each entry" in side.refusals(["--config", ""], variables)[0]
    variables = {
        "BATON_AGENT_TRAINER_ENVIRONMENT": "A=1 B='x y'",
        "BATON_AGENT_GPUS": "GPU-1 GPU-2",
    }
    config = side.config.load(["--config", ""], variables).config
    assert config.trainer_environment["B"] == "x y"
    assert config.gpus == ["GPU-1", "GPU-2"]


def test_tables_of_tables_name_what_they_do_not_know(write: Callable[[str], str]) -> None:
    side = SIDES["coordinator"]
    path = write("[projects.demo]\ngpu_hour_per_day = 48\n")
    assert side.refusals(["--config", path], {}) == [
        f"file {path}: 'projects' must be without 'gpu_hour_per_day' in 'demo'; "
        "did you mean 'gpu_hours_per_day'?"
    ]
    for wrong in ("projects = 1", "[projects]\ndemo = 48", '[projects.demo]\nweight = "2"'):
        (sentence,) = side.refusals(["--config", write(wrong)], {})
        assert "a table of tables with gpu_hours_per_day and weight, not " in sentence
    (sentence,) = side.refusals(["--config", "", "--projects=demo=48"], {})
    assert sentence.startswith("flag --projects: 'projects' must be a table of tables")
    flag = "--projects=demo={ gpu_hours_per_day = 48 }"
    projects = side.config.load(["--config", "", flag], {}).config.projects
    printed = side.sources.toml_value(projects)
    assert printed == '{ "demo" = { "gpu_hours_per_day" = 48.0, "weight" = 1.0 } }'
    path = write(f"projects = {printed}\n")
    assert side.config.load(["--config", path], {}).config.projects == projects


def test_prices_and_leases_are_tables_whose_figures_can_be(write: Callable[[str], str]) -> None:
    side = SIDES["coordinator"]
    lease = (
        '{ gpu_type = "H100", gpus = 8, begin = "2026-11-01", end = "2026-12-01", nodes = "l*" }'
    )
    text = f"[tariffs.H100]\nlease_usd = 2.1\n[leases]\nfirst = {lease}\n"
    found = side.config.load(["--config", write(text)], {}).config
    assert (found.tariffs["H100"].lease_usd, found.tariffs["H100"].burst_usd) == (2.1, None)
    printed = "".join(
        f"{name} = {side.sources.toml_value(getattr(found, name))}\n"
        for name in ("tariffs", "leases")
    )
    assert side.config.load(["--config", write(printed)], {}).config == found, "null is no TOML"
    for wrong, said in (
        ("[tariffs.H100]\nlease_usd = -1", "'lease_usd' of 'H100' in 'tariffs' must be 0 to 1000"),
        ("[tariffs.H100]\nlease_us = 1", "did you mean 'lease_usd'?"),
        ("[leases]\na = " + lease.replace("2026-12-01", "2026-10-01"), "must come after"),
        ("[leases]\na = " + lease.replace("2026-12-01", "soon"), "must be a day as 2026-11-29"),
        (
            "[leases]\na = " + lease.replace("gpus = 8", "gpus = 0"),
            "'gpus' of 'a' in 'leases' must be 1 to",
        ),
        ("power_overhead_percent = 90", "must be 100 to 1000, not 90"),
    ):
        (sentence,) = side.refusals(["--config", write(wrong)], {})
        assert said in sentence


def test_files_that_cannot_be_used(side: Side, write: Callable[[str], str], tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    assert side.refusals(["--config", missing], {}) == [
        f"file {missing}: cannot be read: No such file or directory"
    ]
    path = write("listen = \n")
    (sentence,) = side.refusals([], {side.prefix + "CONFIG": path})
    assert sentence.startswith(f"file {path}: is not TOML: ")
    Path(path).write_bytes(b'listen = "\xff"')
    assert side.refusals(["--config", path], {})[0].startswith(f"file {path}: is not TOML: ")


def test_without_its_default_file_a_program_starts(
    side: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "default.toml"
    monkeypatch.setattr(side.config, "PROGRAM", dataclasses.replace(side.config.PROGRAM, path=path))
    assert side.config.load([], {}).sources["listen"] == "default"
    path.write_text('listen = "127.0.0.1:9"')
    assert side.config.load([], {}).sources["listen"] == f"file {path}"


def test_print_config_is_a_file_that_means_the_same(
    side: Side, write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = 'a "b"\\ \x7f\u00e9\U0001f600'
    text = write(f"state_directory = {side.sources.toml_value('/' + odd.replace(chr(127), ''))}")
    with pytest.raises(SystemExit) as caught:
        side.config.from_command_line(["--config", text, "--print-config", "--listen=[::1]:1"], {})
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert 'listen = "[::1]:1"  # flag --listen' in lines
    assert 'log_level = "info"  # default' in lines
    assert [line.split(" = ")[0] for line in lines] == list(side.config.PROGRAM.types())
    first = side.config.load(["--config", text, "--listen=[::1]:1"], {}).config
    assert side.config.load(["--config", write(printed)], {}).config == first
    assert tomllib.loads(f"x = {side.sources.toml_value(odd)}") == {"x": odd}


def test_what_is_wrong_goes_to_stderr_with_status_2(
    side: Side, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        side.config.from_command_line(["--config", "", "--log-level=loud", "--listen=x"], {})
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == (
        f"{side.config.PROGRAM.name}: 'log_level' must be one of debug, info, warning, error, "
        "not 'loud'"
    )


def test_the_help_has_every_field_with_its_meaning(
    side: Side, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        side.config.from_command_line(["--help"], {})
    assert caught.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, meaning in side.config.PROGRAM.meanings().items():
        assert side.config.PROGRAM.flag(name) in words
        # The help breaks lines after hyphens as well.
        assert meaning.replace(" ", "").replace("-", "") in words.replace(" ", "").replace("-", "")


def test_the_sample_file_has_every_field_with_its_meaning_and_default(
    side: Side, write: Callable[[str], str]
) -> None:
    comments: list[str] = []
    values: dict[str, Any] = {}
    for line in side.sample.read_text().splitlines():
        if line.startswith("# "):
            comments.append(line[2:])
            continue
        if line:
            (name, value), *_ = tomllib.loads(line.removeprefix("#")).items()
            assert " ".join(comments) == side.config.PROGRAM.meanings()[name]
            values[name] = value
        comments = []
    assert list(values) == list(side.config.PROGRAM.types())
    defaults = msgspec.structs.asdict(side.config.load(["--config", ""], {}).config)
    computed = {"node", "trainer_python", "trainer_environment"}  # they differ between machines
    assert {n: v for n, v in values.items() if n not in computed} == {
        n: v for n, v in defaults.items() if n not in computed
    }
    lines = [f"{name} = {side.sources.toml_value(value)}" for name, value in values.items()]
    assert side.config.load(["--config", write("\n".join(lines))], {}).config.validate() == []


def test_a_configuration_cannot_be_changed(side: Side) -> None:
    config = side.config.load(["--config", ""], {}).config
    with pytest.raises(AttributeError):
        config.listen = "0.0.0.0:1"
    assert set(side.config.RELOADABLE) <= set(side.config.PROGRAM.types())


@pytest.mark.parametrize("module", ["sources", "logs", "journald", "notify"])
def test_both_programs_have_the_same_text(module: str) -> None:
    ours, theirs = (ROOT / side / f"{module}.py" for side in ("agent", "coordinator"))
    assert ours.read_text() == theirs.read_text()


def test_both_programs_listen_and_dial_alike() -> None:
    ours, theirs = (
        (ROOT / side / "transport.py").read_text().split('"""', 2)[2]
        for side in ("agent", "coordinator")
    )
    assert ours == theirs
