"""A GPU of which nothing is read gets no new work, and neither it nor a cordoned one is a standby.

What heartbeats say comes in by the front door; what follows is read off orders and answers.
"""

import pytest

from coordinator.core.messages import Effect, FromAgent, Heartbeat, Tick
from coordinator.core.model import GpuTelemetry, GpuVerdict
from coordinator.core.readings import UNREAD_MS
from coordinator.core.state import Options
from tests.core.test_gpu_health import Fleet

BEAT_MS = 5_000
LATE = "it has not answered for 2.0 s, others did, which points to this GPU"


class Read(Fleet):
    """A fleet whose heartbeats say which GPUs are read."""

    def __init__(self, nodes: dict[str, int], options: Options | None = None) -> None:
        super().__init__(nodes, options)
        self.beats = 0

    def beat(self, *unread: str, error: str = LATE) -> list[Effect]:
        """One heartbeat of each node, `BEAT_MS` after the one before."""
        self.rig.now_ms += BEAT_MS
        self.beats += 1
        effects = self.rig.handle(Tick())
        for name, session in self.sessions.items():
            gpus = tuple(
                GpuTelemetry(gpu.uuid, error=error if gpu.uuid in unread else "")
                for gpu in self.rig.core.state.nodes[name].node.gpus
            )
            body = Heartbeat(self.beats, gpus=gpus, attempts=self.held(name))
            effects += self.rig.handle(FromAgent(session, body))
        return effects

    def wait(self, *unread: str) -> None:
        for _ in range(UNREAD_MS // BEAT_MS + 1):
            self.beat(*unread)

    def where(self, job_id: int) -> str:
        attempt = self.rig.disk.attempts.get(f"{job_id}.1")
        return "" if attempt is None else attempt.gpu_uuids[0]


def test_a_gpu_that_is_not_read_gets_no_work_until_it_is() -> None:
    fleet = Read({"n1": 1})
    fleet.wait("n1-g0")
    job_id = fleet.submit()
    assert fleet.where(job_id) == ""
    assert "1 cannot be read" in fleet.explain(job_id)
    assert LATE in fleet.gpu("n1-g0").cordon
    fleet.beat()
    assert fleet.where(job_id) == "n1-g0"
    assert fleet.gpu("n1-g0").cordon == ""


def test_a_late_reading_closes_nothing() -> None:
    fleet = Read({"n1": 1})
    for _ in range(UNREAD_MS // BEAT_MS):
        fleet.beat("n1-g0")
    fleet.beat()
    fleet.beat("n1-g0")
    assert fleet.where(fleet.submit()) == "n1-g0"


def test_a_gpu_that_is_not_read_by_order_stays_open() -> None:
    fleet = Read({"n1": 1})
    for _ in range(20):
        fleet.beat("n1-g0", error="")
    assert fleet.where(fleet.submit()) == "n1-g0"


def test_what_runs_on_it_goes_on() -> None:
    fleet = Read({"n1": 1})
    job_id = fleet.submit()
    fleet.wait("n1-g0")
    assert fleet.rig.disk.attempts[f"{job_id}.1"].ended_unix_ms is None


@pytest.mark.parametrize("cordoned", [True, False])
def test_a_node_whose_gpus_get_no_work_is_no_standby(cordoned: bool) -> None:
    fleet = Read({"n1": 1, "n2": 1, "n3": 1})
    if cordoned:
        fleet.judge("n2-g0", GpuVerdict.NEEDS_RESET)
        fleet.beat()
    else:
        fleet.wait("n2-g0")
    job_id = fleet.submit()
    attempt = fleet.rig.disk.attempts[f"{job_id}.1"]
    assert {attempt.node, attempt.replica_node} == {"n1", "n3"}
