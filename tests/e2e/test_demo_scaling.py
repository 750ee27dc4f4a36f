"""`make demo-scaling` in short: nodes go off, come back, and no job is lost; and what it says.

The demo runs as its own process with a part of the day at a higher speed; nothing of it is
replaced. That the day went well is its own verdict (its exit status); here stands that the verdict
is about the right things, and that nothing is left running.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from coordinator.sim.capacity_replay import Switch
from tests.e2e.cluster import ROOT
from tests.e2e.scaling_day import ACTIVE, JOB_STEPS, STEPS_PER_DAY, scaled, wishes
from tests.e2e.scaling_report import Day, Sample, drawing, lines
from tests.e2e.test_demo import left_by

TIMEOUT_S = 900
# From the hour in which a third less is wanted until half of that is back, two and a half times as
# fast.
ARGUMENTS = ("--first-step", "40", "--steps", "98", "--step-minutes", "4")

NIGHT = Sample(0.0, 2, 0, 4, 0, 2, (1.0,) * 9)
MORNING = Sample(90.0, 4, 0, 4, 0, 0, (4.0,) * 9)
EVENING = Sample(119.0, 4, 2, 4, 2, 0, ())


def day(
    *samples: Sample,
    switches: tuple[Switch, ...] = (),
    lost: tuple[str, ...] = (),
    moved: int = 1,
) -> Day:
    return Day(
        nodes=3,
        gpus_per_node=2,
        samples=samples,
        switches=switches,
        boots_min=(),
        jobs=1,
        lost=lost,
        moved=moved,
        waits_min=(1.0,),
    )


def test_jobs_add_up_to_the_day() -> None:
    assert len(ACTIVE) == 3 * STEPS_PER_DAY
    course = scaled(20)[-STEPS_PER_DAY:]
    jobs = wishes(course)
    held = [sum(job.begin <= step < job.end for job in jobs) for step in range(STEPS_PER_DAY)]
    assert held == list(course)
    lengths = [job.end - job.begin for job in jobs]
    assert all(0 < length <= max(JOB_STEPS) for length in lengths)
    assert dict.fromkeys(sorted(JOB_STEPS)).keys() <= dict.fromkeys(lengths).keys()


def test_a_day_without_a_node_that_went_and_came_fails() -> None:
    stop, up = Switch(1, "n1", "stop"), Switch(2, "n1", "up")
    assert day(NIGHT).failures() == ["no node went off"]
    assert day(NIGHT, switches=(stop,)).failures() == ["no node that went off came back"]
    assert day(NIGHT, switches=(stop, up)).failures() == []
    assert day(NIGHT, switches=(stop, up), lost=("job-1: x",)).failures() == [
        "a job was lost: job-1: x"
    ]
    assert day(NIGHT, switches=(stop, up), moved=0).failures() == []
    late = replace(EVENING, minute=1_200.0)
    assert day(NIGHT, late, switches=(stop, up)).failures() == []
    assert day(NIGHT, late, switches=(stop, up), moved=0).failures() == [
        "nobody was handed off so that a node could go off"
    ]


def test_the_table_counts_what_was_seen() -> None:
    said = lines(day(NIGHT, MORNING, EVENING))
    seen = said[1].split()
    # Two of three nodes for 119 minutes, and a third that starts in the last one.
    assert float(seen[-6]) == pytest.approx((2 * 119 + 3) / 60, abs=0.06)
    assert seen[-5] == "33.1%"
    assert seen[-2] == "0.8%", "three are wanted in that minute, and two are on"
    always = said[3].split()
    assert always[:2] == ["always", "on"]
    assert float(always[2]) == 6.0
    assert said[4].split()[:2] == ["clairvoyant,", "replayed"]
    drawn = drawing(day(NIGHT, MORNING, EVENING))
    ElementTree.fromstring(drawn)  # noqa: S314 (we have written it)


@pytest.mark.e2e
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.xdist_group("demo")
def test_nodes_follow_the_morning_and_no_job_is_lost(tmp_path: Path) -> None:
    plot = tmp_path / "day.svg"
    demo = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.demo_scaling", *ARGUMENTS, "--plot", str(plot)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = demo.communicate(timeout=TIMEOUT_S)
    finally:
        demo.kill()
        demo.communicate()

    assert demo.returncode == 0, told
    for words in (
        "is off",
        "is ordered on",
        "idle timeout 1 h, replayed",
        "lost: 0",
        "handed off",
        str(plot),
    ):
        assert words in told
    assert "Traceback" not in told
    text = plot.read_text("utf-8")
    ElementTree.fromstring(text)  # noqa: S314 (we have written it)
    for words in ("running and waiting", "90%", "needed", "idle"):
        assert words in text
    assert left_by(demo.pid) == []
    assert not Path(ROOT, ".demo", f"run-{demo.pid}").exists()
