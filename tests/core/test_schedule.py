"""What is read when, of which GPU."""

import pytest

from agent.config import TELEMETRY_RATES
from agent.telemetry.schedule import INVENTORY, OFF, PERIODS_MS, SAMPLE, USAGE, Schedule

GPUS = tuple(f"GPU-{place}" for place in range(8))
HOUR_S = 3_600


def reads(rate: str, kind: str, seconds: int) -> list[int]:
    """How often each GPU is read in that time, looked at once a second."""
    schedule = Schedule()
    counts = dict.fromkeys(GPUS, 0)
    for second in range(seconds):
        due = schedule.due(rate, kind, second * 1_000, GPUS)
        schedule.read(kind, due, second * 1_000)
        for uuid in due:
            counts[uuid] += 1
    return list(counts.values())


def test_the_rates_are_those_of_the_configuration() -> None:
    assert tuple(PERIODS_MS) == TELEMETRY_RATES


@pytest.mark.parametrize(
    ("rate", "kind", "expected"),
    [
        ("normal", SAMPLE, HOUR_S),
        ("normal", USAGE, HOUR_S // 10),
        ("normal", INVENTORY, HOUR_S // 60),
        ("slow", SAMPLE, HOUR_S // 10),
        ("slow", USAGE, HOUR_S // 60),
        ("slow", INVENTORY, HOUR_S // 600),
        ("watch", SAMPLE, HOUR_S),
        ("watch", USAGE, HOUR_S // 2),
        ("watch", INVENTORY, HOUR_S // 10),
    ],
)
def test_a_class_is_read_once_a_period(rate: str, kind: str, expected: int) -> None:
    """And once more at the start, since nothing is known then."""
    assert all(expected <= count <= expected + 1 for count in reads(rate, kind, HOUR_S))


@pytest.mark.parametrize("kind", [SAMPLE, USAGE, INVENTORY])
def test_off_reads_nothing(kind: str) -> None:
    assert reads(OFF, kind, HOUR_S) == [0] * len(GPUS)


def test_gpus_of_a_box_are_not_all_read_at_the_same_moment() -> None:
    schedule = Schedule()
    schedule.read(USAGE, GPUS, 0)
    together = []
    for second in range(1, 11):
        due = schedule.due("normal", USAGE, second * 1_000, GPUS)
        schedule.read(USAGE, due, second * 1_000)
        together.append(len(due))
    assert sum(together) == len(GPUS)
    assert max(together) == 1


def test_what_was_never_read_is_due_at_once() -> None:
    schedule = Schedule()
    schedule.read(INVENTORY, GPUS[:7], 1_000)
    assert schedule.due("normal", INVENTORY, 1_500, GPUS) == GPUS[7:]
