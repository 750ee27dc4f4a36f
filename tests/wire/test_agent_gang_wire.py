"""Gangs on the wire, as the coordinator has them: nothing of one is lost, nothing new is said of a
job of one rank."""

import pytest

from coordinator import wire
from coordinator.core import launch, model
from coordinator.core import messages as m
from coordinator.core.phases import AttemptPhase, JobPhase
from protos.baton.v1 import agent_pb2 as pb
from protos.baton.v1 import types_pb2 as types

GANG = launch.Gang(5, 8, 1, 4, 1, ("n1", "n2"), "10.0.0.1", 20_063, ("g0", "g1", "g2", "g3"))
ADDRESSES = (launch.PeerAddress("n1", "n1:1"), launch.PeerAddress("n2", "n2:1"))


def start(gang: launch.Gang | None, *parts: launch.RestorePart) -> pb.StartAttempt:
    candidate = launch.RestoreCandidate("aa" * 32, 7, ADDRESSES, parts)
    spec = model.JobSpec(command=("train",), ranks=8 if gang else 1)
    order = m.StartAttempt("1.2.5" if gang else "1.2", spec, ("g1",), (candidate,), None, 1, gang)
    return pb.SessionResponse.FromString(wire.encode(order).SerializeToString()).start_attempt


def test_a_rank_hears_its_place_and_all_parts() -> None:
    parts = [launch.RestorePart(f"{n}" * 64, ADDRESSES[n - 1 :]) for n in (1, 2)]
    told = start(GANG, *parts)
    assert told.attempt == "1.2.5"
    assert told.spec.ranks == 8
    gang = told.gang
    assert gang.own_parts
    place = (gang.rank, gang.world_size, gang.local_rank, gang.local_world_size, gang.node_rank)
    assert place == (5, 8, 1, 4, 1)
    assert (gang.master_host, gang.master_port) == ("10.0.0.1", 20_063)
    assert (tuple(gang.nodes), tuple(gang.node_gpu_uuids)) == (GANG.nodes, GANG.node_gpu_uuids)
    heard = told.candidates[0].parts
    assert [part.digest[:1] for part in heard] == ["1", "2"]
    assert [[s.address for s in part.sources] for part in heard] == [["n1:1", "n2:1"], ["n2:1"]]


def test_a_job_of_one_rank_is_told_what_it_always_was() -> None:
    told = start(None)
    assert not told.HasField("gang")
    known = {field.name for field, _ in told.spec.ListFields()}
    assert "ranks" not in known
    assert not told.candidates[0].parts


@pytest.mark.parametrize(
    ("capabilities", "knows"), [([], False), ([77], False), ([77, pb.CAPABILITY_GANGS], True)]
)
def test_an_agent_knows_ranks_if_it_says_so(capabilities: list[int], knows: bool) -> None:
    """What a later version can do besides is no matter."""
    said = pb.Hello(node="n1", journal_id="j1")
    said.capabilities.extend(capabilities)  # type: ignore[arg-type]
    heard = wire.decode(
        pb.SessionRequest.FromString(pb.SessionRequest(hello=said).SerializeToString())
    )
    assert isinstance(heard, m.Hello)
    assert heard.gangs is knows


def test_a_part_that_is_proposed_arrives() -> None:
    proposed = pb.CheckpointProposed(digest="aa" * 32, step=7, replicas=["n1"], parts=8)
    event = pb.AgentEvent(sequence=1, attempt="1.2.5", checkpoint_proposed=proposed)
    event.time.FromMilliseconds(1)
    heard = wire.decode(pb.SessionRequest(event=event))
    assert isinstance(heard, m.AgentEvent)
    assert heard.attempt == "1.2.5"
    assert isinstance(heard.body, m.CheckpointProposed)
    assert heard.body.parts == 8


@pytest.mark.parametrize("text", ["1.2.", "1.2.01", "1.2.-1", "1.2.3.4", "1.2.99999", "1.2.x"])
def test_what_is_no_rank_is_refused(text: str) -> None:
    beat = pb.Heartbeat(sequence=1, attempts=[pb.HeldAttempt(attempt=text)])
    with pytest.raises(wire.WireError, match="is no attempt id"):
        wire.decode(pb.SessionRequest(heartbeat=beat))


def test_a_request_for_one_rank_may_say_so_or_not() -> None:
    assert wire.decode_spec(types.JobSpec(command=["x"])).ranks == 1
    assert wire.decode_spec(types.JobSpec(command=["x"], ranks=1)).ranks == 1
    assert wire.decode_spec(types.JobSpec(command=["x"], ranks=-3)).ranks == -3  # refused later


def test_people_see_ranks_and_parts() -> None:
    ranks = [
        model.Attempt(1, 2, f"n{rank}", (), AttemptPhase.RUNNING, 0, rank=rank, ranks=2)
        for rank in range(2)
    ]
    part = model.Part("bb" * 32, 5, ("n1", "n0"))
    kept = model.Checkpoint(1, "aa" * 32, "", 2, 7, 12, ("n0",), 0, parts=(part,))
    job = model.Job(1, model.JobSpec(ranks=2), JobPhase.ACTIVE, 0)
    shown = wire.encode_job(model.JobView(job, tuple(ranks), kept))
    assert [(attempt.id, attempt.rank) for attempt in shown.attempts] == [
        ("1.2.0", 0),
        ("1.2.1", 1),
    ]
    assert shown.spec.ranks == 2
    assert shown.checkpoint.size_bytes == 12
    (heard,) = shown.checkpoint.parts
    assert (heard.digest, heard.size_bytes, list(heard.replicas)) == ("bb" * 32, 5, ["n1", "n0"])
