"""Programs of a site are called as Slurm calls them, and ended with all that they have started."""

import asyncio
import contextlib
import os
import stat
from pathlib import Path

import psutil
import pytest

from coordinator.capacity.driver import CapacityError
from coordinator.capacity.programs import Programs
from coordinator.capacity.running import OUTPUT_BYTES_MAX, run, succeed
from coordinator.core.capacity_orders import CapacityOrder, Verb
from tests.capacity.bench import Bench, VirtualClock
from tests.capacity.site import Site

NODES = ("n01", "n02", "n03", "n07")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)


@pytest.fixture
def driver(site: Site) -> Programs:
    return Programs(site.program("resume"), site.program("suspend"), site.program("resume-fail"))


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def is_there(path: str) -> bool:
    return Path(path).exists()


async def test_a_resume_is_called_as_slurm_calls_it(
    driver: Programs, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET", "not for programs")
    await driver.apply(CapacityOrder("k1", Verb.RESUME, NODES, "H100"))
    (call,) = site.calls()
    assert call["arguments"] == ["n[01-03,07]"]
    assert call["input"] == ""
    assert call["resume"] == {"all_nodes_resume": "n[01-03,07]", "jobs": []}
    environment = call["environment"]
    assert not is_there(environment.pop("SLURM_RESUME_FILE"))
    assert environment == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "BATON_CAPACITY_KEY": "k1",
        "BATON_CAPACITY_VERB": "resume",
        "BATON_GPU_TYPE": "H100",
    }


async def test_a_suspend_has_no_resume_file(driver: Programs, site: Site) -> None:
    await driver.apply(CapacityOrder("k1", Verb.SUSPEND, NODES))
    (call,) = site.calls()
    assert (call["program"], call["arguments"]) == ("suspend", ["n[01-03,07]"])
    assert call["resume"] is None


async def test_a_resume_that_failed_is_told_to_its_program(driver: Programs, site: Site) -> None:
    order = CapacityOrder("k1", Verb.RESUME, NODES)
    await driver.roll_back(order)
    await driver.roll_back(CapacityOrder("k2", Verb.SUSPEND, NODES))
    assert [call["program"] for call in site.calls()] == ["resume-fail", "resume"]


async def test_a_status_other_than_0_fails_with_what_was_printed(
    driver: Programs, site: Site
) -> None:
    site.go_wrong("fail")
    with pytest.raises(CapacityError) as caught:
        await driver.apply(CapacityOrder("k1", Verb.SUSPEND, NODES))
    assert str(caught.value).endswith("/suspend exited with status 3: the power strip is on fire")


async def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(CapacityError, match=r"/nowhere/x cannot be started: No such file"):
        await run(("/nowhere/x",), {})


async def test_at_the_deadline_the_whole_group_is_killed(
    driver: Programs, site: Site, tmp_path: Path
) -> None:
    clock = VirtualClock()
    bench = Bench(driver, NODES, tmp_path / "capacity.jsonl", clock)
    site.go_wrong("hang")
    bench.give("k1", Verb.RESUME, *NODES)
    call = await asyncio.to_thread(site.hanging)
    child = psutil.Process(call["child"])
    clock.pass_deadlines()
    outcomes = await bench.reported(len(NODES))
    assert not any(outcome.done for outcome in outcomes)
    await asyncio.to_thread(psutil.wait_procs, [child])
    await asyncio.to_thread(_has_ended, call["pid"])
    await bench.actuator.close()


def _has_ended(pid: int) -> None:
    """Waits until a child of ours has ended, and leaves it to asyncio to reap it, which may take a
    moment and may have been already."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_of_what_it_prints_the_end_is_kept(tmp_path: Path) -> None:
    text = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    output = await succeed((script(tmp_path, text),), {})
    assert output.endswith("line 19999")
    assert len(output) <= OUTPUT_BYTES_MAX


async def test_who_goes_on_in_the_background_holds_nobody_up(tmp_path: Path) -> None:
    """It keeps the pipe open, and may print after its parent's end."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = f"(read line < {gate}; echo late; echo done > {gate}) & echo $!"
    finished = await run((script(tmp_path, text),), {})
    assert finished.status == 0
    assert psutil.pid_exists(int(finished.output))
    assert await asyncio.to_thread(_through, gate) == "done\n"


def _through(gate: Path) -> str:
    gate.write_text("go on\n")
    return gate.read_text()


async def test_states_of_others_are_left_out_and_nonsense_is_refused(tmp_path: Path) -> None:
    chatty = Programs("", "", states=script(tmp_path, "echo n01 on; echo other off"))
    assert {node: state.value for node, state in (await chatty.state(NODES[:2])).items()} == {
        "n01": "on",
        "n02": "unknown",
    }
    odd = Programs("", "", states=script(tmp_path, "echo n01 is fine"))
    with pytest.raises(CapacityError, match="printed 'n01 is fine', not a node and on or off"):
        await odd.state(NODES)
