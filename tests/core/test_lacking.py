"""What one node lacks (a command, a directory) another one may have: who is believed, and when.

Safety: a job ends only by what nodes say of it, and not of themselves. Liveness: it does end.
"""

from dataclasses import replace

from coordinator.core import messages as m
from coordinator.core import outcomes
from coordinator.core.model import JobClass, JobSpec
from coordinator.core.phases import AttemptPhase, JobPhase, NodePhase
from tests.core.training_fleet import Fleet

LACKS = m.AttemptRefused("no such directory: /data", permanent=True)
FULL = m.AttemptRefused("the disk is full")
TRIES_MAX = 20


def tried(
    fleet: Fleet, job_id: int, rounds_max: int = 1_000, **says: m.AttemptRefused | None
) -> list[list[str]]:
    """The nodes of each try, until the job runs or is over, or so long. What each node says
    is by its name, the last rank's first; with `None` it starts."""
    tries: list[list[str]] = []
    fleet.tick_ms = 1_000
    for _ in range(rounds_max):
        if len(tries) >= TRIES_MAX or fleet.job(job_id).phase is JobPhase.FAILED:
            break
        gang = fleet.state.gang(fleet.job(job_id)) if fleet.job(job_id).epoch else []
        if gang and all(rank.phase is AttemptPhase.ASSIGNED for rank in gang):
            tries.append([rank.node for rank in gang])
            told = [(rank.id, says[rank.node]) for rank in reversed(gang)]
            for attempt_id, word in told:
                if word is None:
                    return tries
                fleet.say(attempt_id, word)
        fleet.rig.now_ms += 1_000
        fleet.train(1.0, save=False)
        fleet.rig.handle(m.Tick())
    return tries


def comes(fleet: Fleet, **asks: int | JobClass) -> int:
    """A job that nobody starts yet."""
    spec = replace(JobSpec(command=("train",), gpus=1), **asks)  # type: ignore[arg-type]
    fleet.rig.handle(m.Request(1, m.Submit(spec)))
    return fleet.state.last_job_id


def test_who_had_no_room_has_not_said_that_it_lacks_anything() -> None:
    fleet = Fleet("1xH100", "1xH100")
    job_id = fleet.submit()
    fleet.say("1.1", m.AttemptExited(None, 9))  # a failure, and not a node's
    assert len(tried(fleet, job_id, n2=FULL, n1=LACKS)) > 3
    assert fleet.job(job_id).reason == f"n1 could not start it: {LACKS.reason}"


def test_a_job_that_may_not_be_run_again_has_not_run_yet() -> None:
    fleet = Fleet("1xH100", "1xH100")
    assert tried(fleet, comes(fleet, max_restarts=0), n1=LACKS, n2=None) == [["n1"], ["n2"]]


def test_two_ranks_of_one_try_are_two_nodes_that_say_so() -> None:
    fleet = Fleet("1xH100", "1xH100")
    job_id = comes(fleet, ranks=2)
    assert tried(fleet, job_id, n1=LACKS, n2=LACKS) == [["n1", "n2"]]
    reason = f"n2 could not start it: {LACKS.reason}; nor could n1"
    assert fleet.job(job_id).reason == reason


def test_a_rank_that_had_no_room_does_not_speak_for_one_that_lacks_something() -> None:
    """Else a gang is tried for ever while the one disk is full, and only that is said."""
    fleet = Fleet("1xH100", "1xH100")
    job_id = comes(fleet, ranks=2)
    assert len(tried(fleet, job_id, n1=FULL, n2=LACKS)) == 4
    assert fleet.job(job_id).reason == f"n2 could not start it: {LACKS.reason}"


def test_a_job_waits_for_another_node_while_the_one_that_lacks_something_is_free() -> None:
    """Else that one ends all that waits as soon as the others are full."""
    fleet = Fleet("1xH100", "1xH100")
    running = fleet.submit()
    job_id = comes(fleet)
    assert fleet.state.gang(fleet.job(running))[0].node == "n1"
    fleet.say(f"{job_id}.1", LACKS)
    fleet.state.avoid.clear()  # as a restart does
    assert tried(fleet, job_id, n2=LACKS, rounds_max=20) == []
    reason = "needs 1 GPU on one node; the only one that fits is taken"
    waits = fleet.state.wait_reason(fleet.job(job_id))
    assert (
        waits
        == f"{reason}; n2 could not start it: {LACKS.reason}; it is asked again 10 min after that"
    )
    fleet.say(f"{running}.1", m.AttemptExited(0))
    assert tried(fleet, job_id, n1=None) == [["n1"]]


def test_a_job_does_not_wait_for_nodes_that_take_no_work_any_more() -> None:
    fleet = Fleet("1xH100", "1xH100")
    fleet.submit()
    job_id = comes(fleet)
    fleet.say(f"{job_id}.1", LACKS)
    assert tried(fleet, job_id, rounds_max=20) == []
    fleet.rig.handle(m.Request(2, m.CordonNode("n1")))
    assert tried(fleet, job_id, n2=LACKS) == [["n2"]]
    assert fleet.job(job_id).reason == f"n2 could not start it: {LACKS.reason}"


def test_a_node_that_is_silent_for_a_moment_is_waited_for_as_well() -> None:
    """As all are after a restart of the coordinator, but for the first to come."""
    fleet = Fleet("1xH100", "1xH100")
    running = fleet.submit()
    job_id = comes(fleet)
    fleet.rig.handle(m.FromAgent(fleet.state.nodes["n1"].session or 0, m.SessionClosed()))
    assert fleet.state.nodes["n1"].phase is NodePhase.SUSPECT
    fleet.say(f"{job_id}.1", LACKS)
    fleet.rig.handle(m.Tick())
    assert fleet.job(job_id).phase is JobPhase.QUEUED
    assert LACKS.reason in fleet.state.wait_reason(fleet.job(job_id))
    assert fleet.job(running).phase is JobPhase.ACTIVE


def test_what_others_have_left_is_not_kept_for_who_cannot_start_there() -> None:
    fleet = Fleet("1xH100", "1xH100")
    for name in ("first", "second"):
        fleet.submit(name=name)
    fleet.run(700)
    job_id = comes(fleet, job_class=JobClass.GUARANTEED)
    (leaves,) = [one for one in fleet.state.attempts.values() if one.phase is AttemptPhase.STOPPING]
    fleet.say(leaves.id, m.AttemptExited(75))
    (attempt,) = fleet.state.gang(fleet.job(job_id))
    assert attempt.node == leaves.node
    fleet.say(attempt.id, LACKS)
    assert fleet.job(job_id).phase is JobPhase.QUEUED
    assert fleet.job(leaves.job_id).phase is JobPhase.ACTIVE


def waits_while_n1_is_full(**asks: int) -> tuple[Fleet, int]:
    """A job that `n2` could not start, and that waits for `n1`."""
    fleet = Fleet("1xH100", "1xH100")
    fleet.submit()
    job_id = comes(fleet, **asks)
    fleet.say(f"{job_id}.1", LACKS)
    return fleet, job_id


def test_who_lacked_something_is_asked_again_where_all_others_are_full() -> None:
    """It may have been mended. Also where nothing else happens: nobody decides over all jobs."""
    fleet, job_id = waits_while_n1_is_full()
    fleet.rig.answers_at_once = False
    before_ms = fleet.rig.now_ms
    assert tried(fleet, job_id, rounds_max=595) == []
    assert tried(fleet, job_id, rounds_max=20, n2=None) == [["n2"]]
    assert fleet.rig.now_ms - before_ms <= outcomes.LACKS_MS + 2_000
    assert fleet.job(job_id).failures == 1


def test_who_still_lacks_it_costs_the_job_nothing() -> None:
    """However often, and though it may not be run again at all."""
    fleet, job_id = waits_while_n1_is_full(max_restarts=0)
    tries = tried(fleet, job_id, n2=LACKS, rounds_max=4_000)
    assert tries == [["n2"]] * 6
    assert (fleet.job(job_id).failures, fleet.job(job_id).phase) == (1, JobPhase.QUEUED)
    fleet.say("1.1", m.AttemptExited(0))
    assert tried(fleet, job_id, n1=None) == [["n1"]]


def test_who_still_lacks_it_and_one_more_are_enough_to_end_it() -> None:
    fleet, job_id = waits_while_n1_is_full()
    assert len(tried(fleet, job_id, n2=LACKS, rounds_max=1_300)) == 2
    fleet.say("1.1", m.AttemptExited(0))
    assert tried(fleet, job_id, n1=LACKS) == [["n1"]]
    reason = f"n1 could not start it: {LACKS.reason}; nor could n2"
    assert (fleet.job(job_id).phase, fleet.job(job_id).reason) == (JobPhase.FAILED, reason)


def test_a_clock_that_goes_back_makes_nobody_wait_for_a_day() -> None:
    fleet, job_id = waits_while_n1_is_full()
    (attempt,) = fleet.state.gang(fleet.job(job_id))
    ended = (attempt.ended_unix_ms or 0) + 86_400_000
    fleet.state.put_attempt(replace(attempt, ended_unix_ms=ended))
    assert outcomes.avoided(fleet.state, fleet.rig.now, fleet.job(job_id)) == ("n2", False)
