"""Gangs in the agent's core: several ranks of one epoch on a node, in every history.

All that `test_agent_machine.py` says of attempts holds for ranks too, with two changes. Safety: no
two of one job run at a time, unless they are ranks of one gang. Liveness: whoever is told to stop
is answered for, each rank once, whether it was ever ordered here or not; only an attempt of an
epoch that is over may be passed over in silence.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from agent.core import messages as m
from agent.core import state as s
from agent.core import trainer_messages as t
from agent.core import values as v
from agent.core.ids import AttemptId, find_attempt_id, parse_attempt_id
from agent.core.node import NodeCore
from tests.core.agent_box import HOST, OPTIONS, PEER
from tests.core.agent_memory import MemoryJournal
from tests.core.test_agent_machine import AgentMachine

UUIDS = ("A", "B")


class GangMachine(AgentMachine):
    def __init__(self) -> None:
        self.highest: dict[int, int] = {}  # by job: the epoch of what the agent has heard
        self.must_end: set[str] = set()
        self.away: set[str] = set()  # trainers that this agent has not heard yet
        super().__init__()

    def boot(self) -> None:
        self.away = set(self.processes)
        super().boot()

    @rule(
        job_id=st.integers(1, 2),
        ranks=st.integers(1, 3),
        shift=st.integers(0, 2),
        replication=st.sampled_from(["automatic", "required"]),
    )
    def place(self, job_id: int, ranks: int, shift: int, replication: str) -> None:
        self.all_flows(True, 0)
        for order in self.gang(job_id, ranks, shift, replication):
            self.order(order)

    @rule(
        ranks=st.integers(1, 3),
        lost=st.integers(0, 7),
        again=st.integers(0, 7),
        grace_ms=st.sampled_from([None, 1_000]),
    )
    def place_and_stop(self, ranks: int, lost: int, again: int, grace_ms: int | None) -> None:
        """The starts of some ranks never arrive (a bit for each in `lost`), and those of some come
        after their stop, perhaps once more."""
        self.all_flows(True, 0)
        gang = self.gang(1, ranks, 0, "automatic")
        for order in [order for rank, order in enumerate(gang) if not lost >> rank & 1]:
            self.order(order)
        for order in gang:
            self.order(m.StopAttempt(order.attempt, grace_ms, "why not"))
        for order in [order for rank, order in enumerate(gang) if again >> rank & 1]:
            self.order(order)
        self.all_flows(True, 3)

    def gang(self, job_id: int, ranks: int, shift: int, replication: str) -> list[m.StartAttempt]:
        """One GPU for each rank, as long as there are any; a gang of one is a job of one rank."""
        epoch = self.epochs[job_id] = self.epochs.get(job_id, 0) + 1
        spec = m.JobSpec(command=("x",), replication=replication)
        gang = []
        for rank in range(ranks):
            uuids = UUIDS[rank + shift : rank + shift + 1]
            name, place = f"{job_id}.{epoch}", None
            if ranks > 1:
                name = f"{name}.{rank}"
                place = v.Gang(rank, ranks, rank, ranks, 0, ("n1",), "n1", 20_000)
            gang.append(m.StartAttempt(name, spec, uuids, (), PEER, gang=place))
            self.gpus[name] = uuids
        self.starts += gang
        return gang

    def handle(self, event: m.Event) -> None:
        if isinstance(event, m.FromCoordinator) and self.core.state.welcomed:
            self.listen(event.order)
        if isinstance(event, m.FromTrainer) and isinstance(event.message, t.TrainerCheckpoint):
            self.hand_over_again(event.attempt, event.message.id)
        super().handle(event)

    def hand_over_again(self, attempt: str, number: int) -> None:
        """To an agent that has come back a trainer repeats what was not answered, oldest first,
        before it says anything new."""
        if attempt in self.away:
            self.away.discard(attempt)
            for message in list(self.offered.get(attempt, {}).values()):
                if message.id < number:
                    super().handle(m.FromTrainer(attempt, message))

    def listen(self, order: m.Order) -> None:
        if not isinstance(order, m.StartAttempt | m.StopAttempt):
            return
        named = parse_attempt_id(order.attempt)
        before = self.highest.get(named.job_id, 0)
        self.highest[named.job_id] = max(before, named.epoch)
        if isinstance(order, m.StopAttempt) and named.epoch >= before:
            self.must_end.add(order.attempt)

    def check(self, record: s.Record) -> None:
        if isinstance(record, s.PutFence) and record.ranks:
            named = f"{record.job_id}.{record.epoch}"
            self.stopped.update(f"{named}.{rank}" for rank in record.ranks)
        else:
            super().check(record)

    def start_process(self, attempt: str) -> None:
        if attempt not in self.processes:
            assert attempt not in self.forgotten | self.stopped | self.ends
            for other in [other for other, running in self.processes.items() if running]:
                own, others = attempt.split("."), other.split(".")
                one_gang = len(own) == len(others) == 3 and own[:2] == others[:2]
                assert own[0] != others[0] or one_gang, "two of one job"
                assert not set(self.gpus[other]) & set(self.gpus[attempt]), "two on one GPU"
            self.processes[attempt] = True
        self.tasks.append(m.ProcessStarted(attempt, 100))

    def check_all_settled(self) -> None:
        super().check_all_settled()
        assert self.must_end <= set(self.ended), "a stop without an answer"


@pytest.mark.long
def test_every_invariant_holds_for_gangs() -> None:
    run_state_machine_as_test(
        GangMachine, settings=settings(max_examples=200, stateful_step_count=60)
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("7.2", AttemptId(7, 2)),
        ("7.2.0", AttemptId(7, 2, 0)),
        ("7.2.1023", AttemptId(7, 2, 1023)),
        ("7.2.1024", None),
        ("7.2.00", None),
        ("7.2.1\n", None),
        ("7.2.1.1", None),
        ("7.2.-1", None),
        ("7", None),
    ],
)
def test_an_attempts_id_has_one_spelling(text: str, named: AttemptId | None) -> None:
    assert find_attempt_id(text) == named


def test_a_fence_of_before_gangs_holds_every_rank_of_its_epoch() -> None:
    journal = MemoryJournal()
    journal.commit([s.PutFence(7, 2)])
    core = NodeCore(OPTIONS, journal.memory())
    held = [core.state.is_fenced(AttemptId(7, 2, rank)) for rank in range(3)]
    assert (held, core.state.is_fenced(AttemptId(7, 3, 0))) == ([True] * 3, False)


def test_parts_of_a_candidate_are_kept_and_looked_for_where_this_node_finds_them() -> None:
    """The coordinator says that a copy is shared; where that is, each node knows for itself."""
    options = s.Options("n1:1", OPTIONS.launch, "/everybody")
    core = NodeCore(options, MemoryJournal().memory())
    shared = (v.ReplicaSource("shared", ""), PEER)
    candidate = v.RestoreCandidate("aa", 5, shared, (v.RestorePart("bb", shared),))
    gang = v.Gang(1, 2, 0, 1, 1, ("n2", "n1"), "n2", 20_000)
    order = m.StartAttempt("7.2.1", m.JobSpec(command=("x",)), (), (candidate,), gang=gang)
    orders = (m.Welcome(1, 1_000, 8_000, 0), order, m.KeepCheckpoints(("cc",)))
    events: list[m.Event] = [m.Opened((), HOST, ()), m.Connected(())]
    events += [m.FromCoordinator(said, "token") for said in orders]
    effects = [effect for event in events for effect in core.handle(s.Instant(0, 0), event)]
    [restore] = [effect for effect in effects if isinstance(effect, m.RestoreCheckpoint)]
    found = (v.ReplicaSource("shared", "/everybody"), PEER)
    assert restore.candidates == (
        v.RestoreCandidate("aa", 5, found, (v.RestorePart("bb", found),)),
    )
    [collect] = [effect for effect in effects if isinstance(effect, m.CollectCheckpoints)]
    assert sorted(collect.keep) == ["aa", "bb", "cc"]


# --- the only copy of a part ----------------------------------------------------------------------

OTHER = v.ReplicaSource("n3", "n3:1")
COPY = m.ReplicateCheckpoint("7.2.1", "bb", PEER)


class Restored:
    """Rank 1 of two has started from a checkpoint in parts, of which it holds its own, "bb". Its
    standby is `PEER`."""

    def __init__(self, *sources: v.ReplicaSource, held: tuple[int, ...] = (1,)) -> None:
        self.core = NodeCore(OPTIONS, MemoryJournal().memory())
        candidate = v.RestoreCandidate("aa", 5, (PEER,), (v.RestorePart("bb", sources),))
        spec, gang = m.JobSpec(command=("x",)), v.Gang(1, 2, 0, 1, 1, ("n2", "n1"), "n2", 20_000)
        order = m.StartAttempt("7.2.1", spec, (), (candidate,), PEER, gang=gang)
        self.hear(m.Opened((), HOST, ()), m.Connected(()))
        for said in (m.Welcome(1, 1_000, 8_000, 0), order):
            self.hear(m.FromCoordinator(said, "token"))
        self.hear(m.RestoreDone("7.2.1", v.Restored("aa", 5, "/restored", (), held)))
        self.began = self.hear(m.ProcessStarted("7.2.1", 100))

    def hear(self, *events: m.Event) -> list[s.Effect]:
        now = s.Instant(0, 0)
        return [effect for event in events for effect in self.core.handle(now, event)]

    def save(self) -> list[s.Effect]:
        """Its part of step 6, "cc", which its trainer hands over."""
        offer = t.TrainerCheckpoint(1, "/staging/6", 6, 2)
        self.hear(m.FromTrainer("7.2.1", offer))
        return self.hear(m.StoreDone("7.2.1", v.StoredCheckpoint("cc", 6, 10, 10)))


def told(effects: list[s.Effect]) -> list[object]:
    return [effect.event.body for effect in effects if isinstance(effect, s.SpoolEvent)]


def test_a_part_that_lies_here_alone_is_copied_at_once() -> None:
    rank = Restored(OTHER)
    assert COPY in rank.began
    copied = rank.hear(m.ReplicationDone("7.2.1", "bb", "n2"))
    assert told(copied) == [m.CheckpointProposed("bb", "aa", 5, 0, ("n1", "n2"), 2)]


@pytest.mark.parametrize("known", [Restored(OTHER, PEER), Restored(OTHER, held=())])
def test_what_the_standby_has_or_every_rank_was_sent_is_not(known: Restored) -> None:
    assert not [effect for effect in known.began if isinstance(effect, m.ReplicateCheckpoint)]


def test_the_next_part_takes_the_place_of_a_copy_under_way() -> None:
    rank = Restored(OTHER)
    assert not [one for one in rank.save() if isinstance(one, m.ReplicateCheckpoint)]
    copied = rank.hear(m.ReplicationDone("7.2.1", "bb", "n2"))
    assert m.ReplicateCheckpoint("7.2.1", "cc", PEER) in copied
    assert not told(copied)


def test_the_next_part_is_copied_when_the_copy_before_it_has_failed() -> None:
    rank = Restored(OTHER)
    rank.save()
    failed = rank.hear(m.ReplicationFailed("7.2.1", "bb", "no"))
    assert m.ReplicateCheckpoint("7.2.1", "cc", PEER) in failed


def test_an_end_does_not_wait_for_a_copy_of_what_was_there_before() -> None:
    rank = Restored(OTHER)
    [ended] = told(rank.hear(m.ProcessEnded(v.ProcessExit("7.2.1", 1, None, ""))))
    assert isinstance(ended, m.AttemptExited)
