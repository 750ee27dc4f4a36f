"""The agent's own fields: what is accepted, and the sentence for what is not."""

import socket
import stat
import sys
from pathlib import Path

import pytest

from agent.config import Config, ConfigError, load, prepare_directories
from agent.transport import Tls

NO_FILE = ("--config", "")
TLS = ("--tls-cert", "c.pem", "--tls-key", "k.pem", "--tls-ca", "ca.pem")


def read(*flags: str, **environment: str) -> Config:
    return load([*NO_FILE, *flags], environment).config


def refusals(*flags: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(*flags)
    return caught.value.sentences


def test_the_defaults_stand() -> None:
    config = read()
    assert config.validate() == []
    assert (config.coordinator, config.listen) == ("127.0.0.1:7070", "127.0.0.1:0")
    assert config.allowed_gpus() is None
    assert config.tls() is None
    assert config.trainer_python == sys.executable
    assert (config.sample_interval_ms, config.restart_absence_ms) == (1_000, 60_000)


@pytest.mark.parametrize(
    ("hostname", "node"),
    [("N1", "n1"), ("gpu_box 7", "gpu-box-7"), ("a.b.c", "a.b.c"), ("-x-", "x"), ("___", "node")],
)
def test_the_host_name_becomes_a_node_id(
    hostname: str, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: hostname)
    assert read().node == node


def test_a_long_host_name_is_cut_to_a_valid_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "a" * 63 + "-" + "b" * 63)
    assert read().node == "a" * 63


@pytest.mark.parametrize("node", ["", "N1", "n_1", "-n1", "n1.", "a" * 65, "shared"])
def test_a_node_id_that_no_coordinator_accepts(node: str) -> None:
    (sentence,) = refusals(f"--node={node}")
    assert sentence.startswith("'node' must be 1 to 64 of a-z, 0-9, '.' and '-'")
    assert sentence.endswith(f"it is '{node}'")


@pytest.mark.parametrize(
    "address", ["7070", ":7070", "host:", "host:x", "host:65536", "host:-1", "::1:7070", "h:٣"]
)
def test_an_address_that_is_none(address: str) -> None:
    for tls in (TLS, ()):  # without TLS no host is named that may not be one
        assert refusals("--coordinator", address, *tls) == (
            f"'coordinator' must be HOST:PORT with a port of 1 to 65535, not '{address}'",
        )


def test_port_0_is_for_listeners_only() -> None:
    assert read("--listen", "[::1]:0").listen == "[::1]:0"
    assert "a port of 1 to 65535" in refusals("--coordinator", "127.0.0.1:0")[0]


def test_listening_beyond_loopback_needs_tls() -> None:
    assert refusals("--listen", "10.0.0.7:7071") == (
        "listening on 10.0.0.7:7071 needs mutual TLS: "
        "give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1",
    )
    assert read("--listen", "10.0.0.7:7071", *TLS).tls() == Tls("c.pem", "k.pem", "ca.pem")


def test_metrics_are_off_and_beyond_loopback_need_tls() -> None:
    assert read().metrics_listen == ""
    assert read("--metrics-listen", "127.0.0.1:0").metrics_listen == "127.0.0.1:0"
    assert refusals("--metrics-listen", "0.0.0.0:9071") == (
        "listening on 0.0.0.0:9071 needs mutual TLS: "
        "give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1",
    )
    assert read("--metrics-listen", "0.0.0.0:9071", *TLS).metrics_listen == "0.0.0.0:9071"
    assert refusals("--metrics-listen", "9071") == (
        "'metrics_listen' must be HOST:PORT with a port of 0 to 65535, not '9071'",
    )


def test_an_agent_obeys_a_remote_coordinator_under_tls_only() -> None:
    (sentence,) = refusals("--coordinator", "c1:7070")
    assert sentence.startswith("the coordinator at c1:7070 is not on this machine")
    assert read("--coordinator", "c1:7070", *TLS).coordinator == "c1:7070"


def test_tls_files_belong_together() -> None:
    assert refusals("--tls-cert", "c.pem") == (
        "'tls_cert', 'tls_key' and 'tls_ca' belong together: give all three or none",
    )


def test_others_are_told_an_address_that_they_can_dial() -> None:
    assert read().advertised(40_001) == "127.0.0.1:40001"
    assert read("--listen", "127.0.0.1:7071").advertised(7071) == "127.0.0.1:7071"
    everywhere = ("--listen", "0.0.0.0:0", *TLS)
    assert refusals(*everywhere) == (
        "nobody can dial 0.0.0.0:0: say in 'advertise' how others reach this node",
    )
    assert read(*everywhere, "--advertise", "n1:0").advertised(40_001) == "n1:40001"
    assert read(*everywhere, "--advertise", "n1:9").advertised(40_001) == "n1:9"


def test_the_path_of_a_socket_has_a_limit() -> None:
    fits = "/" + "r" * (99 - len("//trainers.sock"))
    assert read("--runtime-directory", fits).runtime_directory == fits
    (sentence,) = refusals("--runtime-directory", fits + "r")
    assert "has 100 bytes, and the path of a socket must have fewer than 100" in sentence


@pytest.mark.parametrize(
    "field", "state_directory runtime_directory shared_directory trainer_python port_file".split()
)
def test_paths_are_absolute(field: str) -> None:
    flag = "--" + field.replace("_", "-")
    assert refusals(flag, "here") == (f"'{field}' must be an absolute path, not 'here'",)


def test_gpus_are_all_none_or_named() -> None:
    assert read("--gpus", "").allowed_gpus() == ()
    named = read("--gpus", "GPU-1b2c,MIG-3d").allowed_gpus()
    assert named == ("GPU-1b2c", "MIG-3d")
    sentences = refusals("--gpus", "all,0")
    assert [sentence.rpartition("has ")[2] for sentence in sentences] == ["'all'", "'0'"]
    assert "nvidia-smi -L" in sentences[0]


def test_trainers_get_a_named_few_of_the_agents_variables() -> None:
    agents = {"PATH": "/p", "HOME": "/h", "LD_LIBRARY_PATH": "/l", "SECRET": "s", "HF_HOME": "/m"}
    config = read("--trainer-environment", "A=1=2", "--trainer-environment", "HF_HOME=/n", **agents)
    assert config.trainer_environment == {
        "PATH": "/p",
        "LANG": "C.UTF-8",
        "HOME": "/h",
        "LD_LIBRARY_PATH": "/l",
        "HF_HOME": "/n",
        "A": "1=2",
    }
    assert read().trainer_environment["PATH"] == "/usr/local/bin:/usr/bin:/bin"


def test_variables_that_the_agent_sets_are_its_own() -> None:
    assert refusals("--trainer-environment", "BATON_TOKEN=x", "--trainer-environment", "a-b=x") == (
        "'trainer_environment' has 'BATON_TOKEN': the agent sets BATON_* itself",
        "'trainer_environment' has 'a-b', which no environment can hold",
    )


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [("sample_interval_ms", 100, 60_000), ("restart_absence_ms", 0, 600_000)],
)
def test_ranges_hold_at_both_ends(field: str, low: int, high: int) -> None:
    flag = "--" + field.replace("_", "-")
    for value in (low, high):
        assert getattr(read(f"{flag}={value}"), field) == value
    for value in (low - 1, high + 1):
        assert refusals(f"{flag}={value}") == (f"'{field}' must be {low} to {high}, not {value}",)


def test_directories_are_for_this_user_only(tmp_path: Path) -> None:
    state, runtime = tmp_path / "a" / "state", tmp_path / "run"
    runtime.mkdir(mode=0o755)
    config = read("--state-directory", str(state), "--runtime-directory", str(runtime))
    prepare_directories(config)
    prepare_directories(config)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (state, runtime)] == [0o700, 0o700]


def test_directories_that_will_not_do_are_named(tmp_path: Path) -> None:
    file, everybodys = tmp_path / "file", tmp_path / "tmp"
    file.write_text("")
    everybodys.mkdir()
    everybodys.chmod(0o1777)
    config = read(
        "--state-directory", str(file), "--runtime-directory", str(everybodys),
        "--shared-directory", str(tmp_path / "unmounted"),
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        prepare_directories(config)
    assert caught.value.sentences == (
        f"the directory {file} cannot be used: File exists",
        f"{everybodys} is everybody's: choose a directory of its own below it",
        f"the shared directory {tmp_path}/unmounted is missing: mount or make it",
    )
    assert stat.S_IMODE(everybodys.stat().st_mode) == 0o1777
