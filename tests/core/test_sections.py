"""How long a section may take, and what follows when it takes longer.

Safety: a trainer whose durations stay below the factor is never called hung, however they scatter;
nor is one whose node, or whose agent, was away itself. Liveness: a hang is found within its limit
and one check.
"""

import math
import random
from dataclasses import replace

import pytest

from agent.core import hangs
from agent.core import messages as m
from agent.core.attempt import AttemptRecord
from agent.core.launch import NCCL_PIPES, compose, nccl_pipes
from agent.core.sections import (
    FACTOR,
    LONGEST_FACTOR,
    NAMES_MAX,
    SAMPLES_MAX,
    SAMPLES_MIN,
    SOURCES_MAX,
    UNLEARNED_MS,
    UNLEARNED_OTHER_MS,
    Sections,
    limit_ms,
)
from agent.core.state import Effect, SpoolEvent
from agent.core.trainer_messages import TrainerProgress, TrainerSection
from agent.core.values import Gang, ProcessExit
from tests.core import agent_box

FLOOR_MS = 2_000


class Node(agent_box.Node):
    """With one running attempt, away from any coordinator."""

    options = replace(agent_box.OPTIONS, hang_floor_ms=FLOOR_MS)

    def __init__(self, *environment: tuple[str, str]) -> None:
        super().__init__()
        spec = m.JobSpec(command=("train",), environment=environment)
        self.run(m.StartAttempt("1.1", spec, ()))
        self.hear(m.Disconnected("cut"))

    def enter(self, name: str, *, count: int = 1, source: int = 1) -> list[Effect]:
        return self.hear(m.FromTrainer("1.1", TrainerSection(source, name, count)))

    def steps(self, durations_ms: list[int]) -> list[Effect]:
        """One after another, with the ticks that the core asks for; everything that it did."""
        effects: list[Effect] = []
        for duration_ms in durations_ms:
            effects += self.enter("step")
            effects += self.wait(duration_ms)
        return effects

    def wait(self, duration_ms: int) -> list[Effect]:
        until_ms = self.now_ms + duration_ms
        effects: list[Effect] = []
        while (wake_ms := self.core.next_wake_ms()) is not None and wake_ms <= until_ms:
            self.now_ms = wake_ms
            effects += self.hear(m.Tick())
        self.now_ms = until_ms
        return effects


def dumps(effects: list[Effect]) -> list[m.DumpStacks]:
    return [effect for effect in effects if isinstance(effect, m.DumpStacks)]


def kills(effects: list[Effect]) -> list[m.KillProcess]:
    return [effect for effect in effects if isinstance(effect, m.KillProcess)]


def noisy_ms(seed: int, steps: int, usual_ms: int) -> list[int]:
    """Log-normal, and one in 25 from a heavy tail (Pareto) that ends at half the factor."""
    chance = random.Random(seed)
    longest_ms = usual_ms * FACTOR // 2
    scattered = [
        usual_ms * (chance.paretovariate(0.7) if chance.random() < 0.04 else 1)
        * math.exp(chance.gauss(0, 0.2))
        for _ in range(steps)
    ]  # fmt: skip
    return [min(longest_ms, round(one)) for one in scattered]


@pytest.mark.parametrize("seed", range(20))
def test_noise_with_a_heavy_tail_is_no_hang(seed: int) -> None:
    node = Node()
    durations_ms = noisy_ms(seed, 400, usual_ms=1_000)
    assert max(durations_ms) > 2 * FLOOR_MS, "the tail was never beyond the floor"
    assert dumps(node.steps(durations_ms)) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_hang_is_found_within_its_limit_and_one_check(seed: int) -> None:
    node = Node()
    durations_ms = noisy_ms(seed, 100, usual_ms=1_000)
    node.steps(durations_ms)
    node.enter("step")
    limit = limit_ms("step", node.core.state.attempts["1.1"].sections.histories["step"], FLOOR_MS)
    assert limit <= LONGEST_FACTOR * max(durations_ms) + FACTOR * 3_000
    assert dumps(node.wait(limit)) == []
    assert len(dumps(node.wait(hangs.CHECK_MS + 1))) == 1
    assert kills(node.wait(hangs.DUMP_MS)) == [m.KillProcess("1.1")]
    assert dumps(node.wait(10 * limit)) == [], "asked once"


def test_the_end_says_what_it_hung_in() -> None:
    node = Node()
    node.steps([100] * 20)
    node.enter("step")
    node.wait(20_000)
    effects = node.hear(m.ProcessEnded(ProcessExit("1.1", None, 9)))
    (told,) = [effect.event.body for effect in effects if isinstance(effect, SpoolEvent)]
    said = "hung in step for 3 s (limit 2 s); stacks are in its log"
    assert told == m.AttemptExited(None, 9, said, by_itself=True)


@pytest.mark.parametrize(
    ("exit_code", "blamed"), [(0, False), (1, False), (75, False), (137, True)]
)
def test_an_end_of_its_own_is_no_hang(exit_code: int, blamed: bool) -> None:
    """It came to itself in the pause, and left as programs leave; 137 is a shell's word for a
    kill."""
    node = Node()
    node.steps([100] * 20)
    node.enter("step")
    assert dumps(node.wait(FLOOR_MS + 2 * hangs.CHECK_MS))
    effects = node.hear(m.ProcessEnded(ProcessExit("1.1", exit_code, None)))
    (told,) = [effect.event.body for effect in effects if isinstance(effect, SpoolEvent)]
    assert isinstance(told, m.AttemptExited)
    assert (told.reason != "") == blamed


def test_what_was_survived_once_is_never_a_hang() -> None:
    """Every 300th step takes a minute, where others take a tenth of a second."""
    node = Node()
    node.steps([100] * SAMPLES_MIN)
    history = node.core.state.attempts["1.1"].sections.histories["step"]
    history.add(60_000, 1)
    for _ in range(3):
        assert dumps(node.steps([100] * 300 + [60_000])) == []


def test_the_silence_of_the_whole_node_is_no_hang() -> None:
    node = Node()
    node.steps([100] * 20)
    node.enter("step")
    node.now_ms += 3_600_000  # suspended, and nobody could tick
    assert dumps(node.hear(m.Tick())) == []
    assert dumps(node.wait(FLOOR_MS)) == [], "time begins again"
    assert len(dumps(node.wait(2 * hangs.CHECK_MS))) == 1, "and a hang is still found"


def test_what_an_absence_has_spoilt_is_not_learned() -> None:
    node = Node()
    node.steps([100] * 20)
    node.enter("step")
    node.now_ms += 3_600_000
    node.enter("step")
    history = node.core.state.attempts["1.1"].sections.histories["step"]
    assert max(history.recent_ms) <= 100
    assert history.seen == 20


def test_progress_shows_life_and_repeated_progress_does_not() -> None:
    node = Node()
    node.steps([100] * 20)
    node.enter("step")
    said = []
    for step in range(20):
        said += node.hear(m.FromTrainer("1.1", TrainerProgress(step, None, ())))
        said += node.wait(1_000)
    assert dumps(said) == []
    for _ in range(4):
        said += node.hear(m.FromTrainer("1.1", TrainerProgress(19, None, ())))
        said += node.wait(1_000)
    assert len(dumps(said)) == 1


def test_steps_are_learned_though_each_tells_its_progress() -> None:
    """It is told at a step's end, before the next one is entered: of every step, then."""
    node = Node()
    for step in range(20):
        node.enter("step")
        node.wait(100)
        node.hear(m.FromTrainer("1.1", TrainerProgress(step, None, ())))
    node.enter("step")
    history = node.core.state.attempts["1.1"].sections.histories["step"]
    assert list(history.recent_ms) == [100.0] * 20
    assert len(dumps(node.wait(2 * FLOOR_MS))) == 1


def test_each_rank_is_looked_at_alone() -> None:
    """One of two hangs, the other goes on for a while."""
    node = Node()
    node.steps([100] * 20)
    node.enter("step", source=2)
    said = []
    for _ in range(30):
        said += node.enter("step", source=1)
        said += node.wait(500)
    assert len(dumps(said)) == 1
    assert kills(said) == [m.KillProcess("1.1")]


@pytest.mark.parametrize("how", ["left", "disconnected", "stopping", "switched off", "silent"])
def test_where_there_is_no_limit(how: str) -> None:
    node = Node(("BATON_HANG_LIMIT", "0" if how == "switched off" else "1"))
    if how != "silent":
        node.steps([100] * 20)
        node.enter("step")
    if how == "left":
        node.enter("")
    elif how == "disconnected":
        node.hear(m.FromTrainer("1.1", TrainerSection(1, ended=True)))
    elif how == "stopping":
        node.hear(m.Connected(()))
        node.hear(m.FromCoordinator(m.Welcome(1, 1_000, 8_000, 0), "0" * 32))
        stop = m.StopAttempt("1.1", 10**9, "make room")
        node.hear(m.FromCoordinator(stop, "2" * 32))
        node.hear(m.Disconnected("cut"))
    assert dumps(node.wait(UNLEARNED_OTHER_MS * 2 if how == "silent" else 600_000)) == []


def test_nothing_is_asked_of_the_clock_when_nobody_is_in_a_section() -> None:
    node = Node()
    node.steps([100] * 20)
    node.enter("")
    node.wait(10 * hangs.CHECK_MS)
    assert node.core.state.section_check_ms is None


def test_the_pipes_of_the_flight_recorder_are_named() -> None:
    node = Node(("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", "/p/nccl"), ("TORCH_FR_DUMP_TEMP_FILE", "/d/t"))
    node.steps([100] * 20)
    node.enter("step")
    effects = node.wait(20_000)
    assert dumps(effects) == [m.DumpStacks("1.1", "/p/nccl")]
    (hung,) = [one for one in effects if isinstance(one, m.Log) and one.event == "attempt.hung"]
    assert dict(hung.fields)["nccl_dump"] == "/d/t"
    (told,) = [one for one in effects if isinstance(one, m.TellTrainer)]
    reason = "hung in step for 3 s (limit 2 s)"
    assert told == m.TellTrainer("1.1", (("type", "hung"), ("reason", reason)))


def test_a_hang_of_several_gpus_asks_the_flight_recorder_unasked() -> None:
    node = Node()
    live = node.core.state.attempts["1.1"]
    live.record = replace(live.record, gpu_uuids=("GPU-a", "GPU-b"))
    node.steps([100] * 20)
    node.enter("step")
    effects = node.wait(20_000)
    assert dumps(effects) == [m.DumpStacks("1.1", "/attempts/1.1/staging/nccl-")]
    (hung,) = [one for one in effects if isinstance(one, m.Log) and one.event == "attempt.hung"]
    assert dict(hung.fields)["nccl_dump"] == "torch's default"


@pytest.mark.parametrize(
    ("gpus", "ranks", "said", "pipes"),
    [
        (2, 1, (), "/attempts/1.1/staging/nccl-"),
        (1, 2, (), "/attempts/1.1.0/staging/nccl-"),
        (2, 1, ((NCCL_PIPES, "/own/p"),), "/own/p"),
        (2, 1, ((NCCL_PIPES, ""),), ""),
        (1, 1, (), ""),
        (0, 2, (), ""),
    ],
)
def test_ranks_that_speak_over_nccl_have_pipes_without_being_told(
    gpus: int, ranks: int, said: tuple[tuple[str, str], ...], pipes: str
) -> None:
    spec = m.JobSpec(command=("train",), environment=said)
    gang = Gang(0, 2, 0, 1, 0, ("n1", "n2"), "n1", 20_000, ()) if ranks > 1 else None
    name = "1.1.0" if gang else "1.1"
    record = AttemptRecord(name, 1, 1, spec, ("a", "b")[:gpus], (), None, False, 0, "t", gang=gang)
    assert nccl_pipes(record, agent_box.LAUNCH) == pipes
    of_node = replace(agent_box.LAUNCH, base_environment=((NCCL_PIPES, "/node/p"),))
    owner = said[0][1] if said else "/node/p"
    assert nccl_pipes(record, of_node) == owner
    assert dict(compose(record, of_node).environment)[NCCL_PIPES] == owner
    environment = dict(compose(record, agent_box.LAUNCH).environment)
    assert environment.get(NCCL_PIPES, "") == pipes


def test_before_enough_is_known_the_limit_is_the_section_s_own() -> None:
    sections = Sections()
    for number in range(SAMPLES_MIN):
        assert limit_ms("eval", sections.histories.get("eval"), 1) == UNLEARNED_MS["eval"]
        sections.enter(number * 1_000, 1, "eval", 1)
        sections.enter(number * 1_000 + 10, 1, "", 1)
    assert limit_ms("eval", sections.histories["eval"], 1) == FACTOR * 10
    assert limit_ms("own", None, 1) == UNLEARNED_OTHER_MS


def test_many_in_one_word_are_their_mean() -> None:
    sections = Sections()
    sections.enter(0, 1, "step", 0)
    sections.enter(200, 1, "step", 50)
    history = sections.histories["step"]
    assert (history.seen, list(history.recent_ms)) == (50, [4.0])
    assert limit_ms("step", history, 1) == FACTOR * 4


def test_a_word_said_again_teaches_nothing() -> None:
    sections = Sections()
    sections.enter(0, 1, "step", 1)
    sections.enter(60_000, 1, "step", 0)
    assert sections.histories == {}


def test_everything_is_bounded() -> None:
    sections = Sections()
    for number in range(SOURCES_MAX + 5):
        sections.enter(number, number, "step", 1)
    assert len(sections.present) == SOURCES_MAX
    for number in range(3 * SAMPLES_MAX):
        sections.enter(number, 0, "step", 1)
        sections.enter(number, 1, f"own {number}", 1)
    assert len(sections.histories["step"].recent_ms) == SAMPLES_MAX
    assert len(sections.histories) == NAMES_MAX
