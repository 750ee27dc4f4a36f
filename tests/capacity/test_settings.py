"""The tables of the configuration: what is wrong is said in sentences, and no secret is shown."""

import re
from pathlib import Path

import pytest

from coordinator.capacity.opening import open_groups
from coordinator.capacity_settings import NEEDED
from coordinator.config import Config, ConfigError, load, print_config
from coordinator.core.bursts import Burst
from coordinator.scaling_settings import rented_names, scaling_options
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
        (
            "nodes='n1', driver='burst', create_program='/c', gpu_type='H100', gpus_per_node=8",
            "needs 'delete_program'",
        ),
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


RENTS = "driver='burst', create_program='/c', delete_program='/d', gpus_per_node=8"


def test_what_is_rented_has_a_type_a_price_and_one_group() -> None:
    (said,) = refusals(f"a={{nodes='r1', {RENTS}}}")
    assert "the driver 'burst' needs 'gpu_type'" in said
    (said,) = refusals(f"a={{nodes='r1', {RENTS}, gpu_type='X9'}}")
    assert "'a' in 'capacity' rents X9, which has no price: say 'burst_usd'" in said
    groups = [f"{name}={{nodes='{name}1', {RENTS}, gpu_type='H100'}}" for name in "ab"]
    assert refusals(*groups) == (
        "'b' and 'a' in 'capacity' both rent H100; one group holds all names of a type",
    )
    (said,) = refusals(f"rack={{nodes='n1', {PROGRAMS}, gpu_type='H100'}}")
    assert "the driver 'programs' has no 'gpu_type'" in said


def test_what_may_be_rented_is_as_configured_and_nothing_by_default() -> None:
    plain = scaling_options(read(f"rack={{nodes='n1', {PROGRAMS}}}"))
    assert (plain.rules.bursts, plain.names, plain.rules.budget_usd_per_day) == ({}, {}, 0)
    group = f"a={{nodes='r[1-2]', {RENTS}, gpu_type='H100'}}"
    arguments = ["--config", "", f"--capacity={group}", "--tariffs=H100={burst_usd=3.5}"]
    config = load([*arguments, "--scaling-budget-usd-per-day=50"], {}).config
    found = scaling_options(config)
    assert found.rules.bursts == {"H100": Burst(3.5, gpus_per_node=8)}
    assert found.names == {"H100": {"r1": None, "r2": None}}
    assert (found.rules.budget_usd_per_day, found.rules.spends_alone) == (50, False)
    assert rented_names(config) == ("r1", "r2")


def test_spares_may_differ_by_type_and_a_margin_stays_on() -> None:
    plain = scaling_options(load(["--config", ""], {}).config).rules
    assert (plain.bounds.spares, plain.bounds.spares_min, plain.margin_ratio) == ({}, 1, 0.0)
    said = ["--config", "", "--scaling-of=H100={spares=2}", "--scaling-margin-percent=15"]
    found = scaling_options(load(said, {}).config).rules
    assert (found.bounds.spares, found.bounds.spares_min) == ({"H100": 2}, 1)
    assert found.margin_ratio == 0.15
    with pytest.raises(ConfigError, match="spares of H100 in scaling_of"):
        load(["--config", "", "--scaling-of=H100={spares=-1}"], {})


def test_nobody_is_given_work_while_an_order_may_still_switch_him_off() -> None:
    slow = f"rack1={{nodes='n1', {PROGRAMS}, deadline_ms=900000}}"
    (sentence,) = refusals(slow)
    assert "must be more than the 900000 of 'deadline_ms' of 'rack1'" in sentence
    patient = ["--config", "", f"--capacity={slow}", "--scaling-stop-deadline-ms=900001"]
    assert load(patient, {}).config.scaling_stop_deadline_ms == 900_001


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


def test_the_examples_of_the_page_are_right(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/capacity.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "coordinator.toml"
    path.write_text(example)
    config = load(["--config", str(path)], {}).config
    drivers = {group.driver for group in config.capacity.values()}
    assert drivers == set(NEEDED) - {"simulated"}
    assert open_groups(config, VirtualClock())["h016"].name == "rack2"


def test_a_start_has_time_to_succeed() -> None:
    arguments = ["--config", "", "--scaling-boot-ms=600000"]
    with pytest.raises(ConfigError) as said:
        load([*arguments, "--scaling-boot-deadline-ms=600000"], {})
    assert "must be more than the 600000 of 'scaling_boot_ms'" in str(said.value)
    config = load([*arguments, "--scaling-boot-deadline-ms=600001"], {}).config
    assert config.scaling_boot_deadline_ms == 600_001
