"""What who waits is told of nodes that start, and of starts that fail."""

from coordinator.core.capacity_model import Power
from coordinator.core.explanations import Explanation
from coordinator.core.messages import CordonNode, ExplainJob, Reply, Request, Submit
from coordinator.core.model import JobSpec
from tests.core.switched_fleet import ACTS, SwitchedRig
from tests.core.test_power import shown


def test_who_waits_is_told_that_a_start_fails_from_the_first_time_on() -> None:
    fleet = SwitchedRig.new()
    for name in ("n1", "n2", "n3"):
        fleet.hello(name)
    fleet.off("n3")
    for name in ("n1", "n2"):
        fleet.handle(Request(1, CordonNode(name)))
    fleet.handle(Request(1, Submit(JobSpec(command=("x",), gpus=1))))
    job = fleet.rig.core.state.last_job_id

    def told() -> str:
        effects = fleet.handle(Request(1, ExplainJob(job)))
        (answer,) = (effect.answer for effect in effects if isinstance(effect, Reply))
        assert isinstance(answer, Explanation)
        return answer.sentence

    fleet.start("n3")
    assert "; n3 is starting and is expected within 20 s" in told()
    fleet.answer("n3", done=False, reason="no route to the BMC")
    fleet.wait(1_000)
    assert told().endswith(
        "; the start of n3 has failed once: no route to the BMC; it is tried again within 4 s,"
        " 3 times in all"
    )
    assert shown(fleet, "n3") == (
        "its start has failed once: no route to the BMC; it is tried again within 4 s, 3 times in"
        " all"
    )
    fleet.wait(ACTS.boot_retry_ms)
    assert told().endswith(
        "; n3 is starting and is expected within 19 s (it has failed once: no route to the BMC;"
        " try 2 of 3)"
    )
    fleet.answer("n3", done=False)
    assert "the start of n3 has failed twice" not in told()
    assert "the start of n3 has failed 2 times: its driver does not say why" in told()
    fleet.wait(ACTS.boot_retry_ms)
    fleet.answer("n3", done=False, reason="no route to the BMC")
    fleet.wait(1_000)
    assert fleet.power("n3") is Power.FAILED
    assert told().endswith(
        "; n3 did not start: no route to the BMC; tried 3 times, `baton uncordon n3` tries again"
    )
