"""A GPU of which nothing is read gets no new work, and neither it nor a cordoned one is a standby.

What heartbeats say comes in by the front door; what follows is read off orders and answers.
"""

import pytest

from coordinator.core.messages import (
    Effect,
    FromAgent,
    Heartbeat,
    Refusal,
    Request,
    Send,
    Tick,
    Welcome,
)
from coordinator.core.model import GpuReading, GpuVerdict, TelemetryRate
from coordinator.core.node_requests import SetTelemetryRate
from coordinator.core.readings import REPORTS_UNREAD, UNREAD_MS
from coordinator.core.state import Options
from tests.core.test_gpu_health import Fleet

BEAT_MS = 5_000
LATE = "it has not answered for 2.0 s, others did, which points to this GPU"


class Read(Fleet):
    """A fleet whose heartbeats say which GPUs are read."""

    def __init__(self, nodes: dict[str, int], options: Options | None = None) -> None:
        super().__init__(nodes, options)
        self.beats = 0

    def beat(
        self, *unread: str, error: str = LATE, read_between: bool = False, age_ms: int = 0
    ) -> list[Effect]:
        """One heartbeat of each node, `BEAT_MS` after the one before."""
        self.rig.now_ms += BEAT_MS
        self.beats += 1
        effects = self.rig.handle(Tick())
        for name, session in self.sessions.items():
            gpus = tuple(
                GpuReading(
                    gpu.uuid,
                    error=error if gpu.uuid in unread else "",
                    age_ms=age_ms,
                    read_between=read_between,
                    figures=b"beat %d" % self.beats,
                )
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


def test_a_gpu_that_was_read_between_two_failures_stays_open() -> None:
    fleet = Read({"n1": 1})
    for _ in range(20):
        fleet.beat("n1-g0", read_between=True)
    assert fleet.where(fleet.submit()) == "n1-g0"


def test_one_that_is_reported_seldom_is_not_called_silent_sooner() -> None:
    options = Options(lease_ms=600_000, report_interval_ms=4 * UNREAD_MS)
    fleet = Read({"n1": 1}, options)
    fleet.beat("n1-g0")
    beats = REPORTS_UNREAD * options.report_interval_ms // BEAT_MS
    for _ in range(beats - 1):
        fleet.beat("n1-g0")
    assert fleet.gpu("n1-g0").cordon == ""
    fleet.beat("n1-g0")
    assert f"{REPORTS_UNREAD * options.report_interval_ms // 1000} s is the limit" in (
        fleet.gpu("n1-g0").cordon
    )


def test_a_reading_grows_old_until_the_next_report() -> None:
    """Heartbeats without a report in between renew the lease, and nothing else."""
    fleet = Read({"n1": 1})
    fleet.beat(age_ms=700)
    assert fleet.gpu("n1-g0").age_ms == 700
    fleet.rig.now_ms += 2_000
    fleet.beats += 1
    fleet.rig.handle(FromAgent(fleet.sessions["n1"], Heartbeat(fleet.beats)))
    assert fleet.gpu("n1-g0").age_ms == 2_700
    assert fleet.gpu("n1-g0").figures == b"beat 1"


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


def rates(effects: list[Effect]) -> list[TelemetryRate]:
    orders = [effect.order for effect in effects if isinstance(effect, Send)]
    return [order.telemetry_rate for order in orders if isinstance(order, Welcome)]


def test_a_rate_is_told_at_once_and_again_with_every_welcome() -> None:
    fleet = Read({"n1": 1})
    asked = SetTelemetryRate("n1", TelemetryRate.WATCH)
    assert rates(fleet.rig.handle(Request(1, asked))) == [TelemetryRate.WATCH]
    assert rates(fleet.rig.handle(Request(2, asked))) == [], "it has it"
    assert fleet.node("n1").node.telemetry_rate is TelemetryRate.WATCH
    assert rates(fleet.hello("n1")) == [TelemetryRate.WATCH]
    fleet.rig.restart()
    assert rates(fleet.hello("n1")) == [TelemetryRate.WATCH], "it is durable"
    assert isinstance(fleet.ask(SetTelemetryRate("n2", TelemetryRate.OFF)), Refusal)
