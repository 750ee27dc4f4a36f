"""The tables of the configuration: what is wrong is said in sentences, and no secret is shown."""

from pathlib import Path

import pytest

from coordinator.capacity.opening import open_groups
from coordinator.config import Config, ConfigError, load, print_config
from tests.capacity.bench import VirtualClock

PROGRAMS = "driver='programs', resume_program='/r', suspend_program='/s'"


def read(*tables: str, **environment: str) -> Config:
    flags = [f"--capacity={table}" for table in tables]
    return load(["--config", "", *flags], environment).config


def refusals(*tables: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(*tables)
    return caught.value.sentences


def test_without_tables_no_node_is_switched() -> None:
    assert open_groups(read(), VirtualClock()) == {}


def test_each_node_has_its_groups_driver() -> None:
    config = read(
        f"rack1={{nodes='n[1-3]', {PROGRAMS}, deadline_ms=5000}}",
        "rack2={nodes='m1,m2', driver='simulated'}",
    )
    groups = open_groups(config, VirtualClock())
    assert list(groups) == ["n1", "n2", "n3", "m1", "m2"]
    assert (groups["n2"].name, groups["n2"].deadline_ms) == ("rack1", 5_000)
    assert groups["m1"].deadline_ms == 600_000


def test_a_misspelt_key_names_the_right_one() -> None:
    (sentence,) = refusals("rack1={nodes='n1', driver='programs', resume_programm='/r'}")
    assert sentence == (
        "flag --capacity: 'capacity' must be without 'resume_programm' in 'rack1'; "
        "did you mean 'resume_program'?"
    )


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("driver='x'", "'driver' must be one of programs, redfish, ipmi, wake, burst, simulated"),
        ("driver='simulated'", "'nodes' must name at least one node"),
        ("driver='simulated', nodes='n[2-1]'", "'nodes': the range '2-1' goes down"),
        ("nodes='n1', driver='programs', resume_program='/r'", "needs 'suspend_program'"),
        (f"nodes='n1', {PROGRAMS}, state_program='s'", "'state_program' must be an absolute path"),
        (f"nodes='n1', {PROGRAMS}, ca_file='/c'", "the driver 'programs' has no 'ca_file'"),
        (f"nodes='n1', {PROGRAMS}, deadline_ms=1", "'deadline_ms' must be 1000 to 7200000, not 1"),
        ("nodes='n1', driver='burst', create_program='/c'", "needs 'delete_program'"),
        ("nodes='n1', driver='ipmi', address='b'", "the driver 'ipmi' needs 'credentials_file'"),
        (
            "nodes='n1', driver='ipmi', address='-x', credentials_file='/c'",
            "the address of n1 must be a host's name or address",
        ),
        (
            "nodes='n[1-2]', driver='ipmi', address='b', credentials_file='/c'",
            "'address' must have {node} in it",
        ),
        (
            "nodes='n1', driver='redfish', address='http://bmc', credentials_file='/c'",
            "the address of n1 must be https://HOST[:PORT]; http:// would show its password",
        ),
        (
            "nodes='n[1-2]', driver='redfish', addresses={n1='https://b'}, credentials_file='/c'",
            "the address of n2 is missing",
        ),
        (
            "nodes='n1', driver='ipmi', address='b', addresses={n9='b'}, credentials_file='/c'",
            "'addresses' names n9, which is not among its nodes",
        ),
        (
            "nodes='n1', driver='wake', addresses={n1='00:11'}, suspend_program='/s'",
            "the address of n1 must be a MAC address",
        ),
        (
            "nodes='n1', driver='ipmi', address='b', credentials_file='/c', graceful_ms=600000",
            "'graceful_ms' must be 0 to less than deadline_ms (600000)",
        ),
    ],
)
def test_what_will_not_do_is_said(table: str, sentence: str) -> None:
    (said,) = refusals(f"rack={{{table}}}")
    assert said.startswith("'rack' in 'capacity': ")
    assert sentence in said


def test_a_node_belongs_to_one_group() -> None:
    assert refusals(f"a={{nodes='n[1-3]', {PROGRAMS}}}", f"b={{nodes='n[3-4]', {PROGRAMS}}}") == (
        "'b' and 'a' in 'capacity' both have the node n3",
    )


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    (said,) = refusals(
        "rack={nodes='n1', driver='redfish', address='https://root:calvin@bmc',"
        " credentials_file='/c'}"
    )
    assert "belong in credentials_file" in said
    assert "calvin" not in said


def test_what_is_in_force_is_printed_and_can_be_read_again(tmp_path: Path) -> None:
    table = "r={nodes='n1', driver='ipmi', address='{node}-bmc', credentials_file='/c'}"
    loaded = load(["--config", "", f"--capacity={table}"], {})
    path = tmp_path / "coordinator.toml"
    path.write_text(print_config(loaded))
    assert load(["--config", str(path)], {}).config.capacity == loaded.config.capacity
    assert loaded.config.capacity["r"].address_of("n1") == "n1-bmc"


def test_credentials_may_be_systemds() -> None:
    table = (
        "r={nodes='n1', driver='ipmi', address='b', credentials_file='$CREDENTIALS_DIRECTORY/bmc'}"
    )
    config = read(table, CREDENTIALS_DIRECTORY="/run/c")
    assert config.capacity["r"].credentials_file == "/run/c/bmc"
    (said,) = refusals(table)
    assert "'credentials_file' must be an absolute path" in said
