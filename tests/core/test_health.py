"""The verdict on a GPU: never healthy too early, never ill for ever.

Histories are made of errors, readings, ends of applications and time; what must hold after each
step is said once, from the outside.
"""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from agent.core.health import (
    CASES_MAX,
    QUIET_MS,
    SAME_MS,
    SETTLE_MS,
    SEVERITY,
    SILENT_READINGS,
    Action,
    GpuHistory,
    GpuVerdict,
    Verdict,
    XidRule,
    XidTable,
    application_ended,
    driver_loaded,
    judge,
    note_reading,
    note_xid,
    recovery_action,
)
from agent.core.values import GpuCondition, GpuSample, XidSeen

GPU = "GPU-a"
TABLE = XidTable(
    1,
    "test",
    "2026-01-01",
    Action.INSPECT,
    {
        63: XidRule(Action.IGNORE, "remapping"),
        79: XidRule(Action.REBOOT, "GPU has fallen off the bus", lost=True),
        94: XidRule(Action.RESTART_APPLICATION, "contained memory error"),
        95: XidRule(Action.RESET, "uncontained memory error"),
        154: XidRule(Action.READ, "GPU recovery action changed"),
    },
)
RESET_REQUIRED = "GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)"
NONE_REQUIRED = "GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"


@dataclass
class Gpu:
    """One GPU's history and a clock."""

    now_ms: int = 1_000_000
    in_use: bool = True
    energy_mj: int = 1_000
    history: GpuHistory = field(default_factory=GpuHistory)

    def xid(self, code: int, text: str = "", source: str = "kernel") -> bool:
        seen = XidSeen(code, source, self.now_ms, uuid=GPU, text=text)
        return note_xid(self.history, self.now_ms, seen, TABLE)

    def read(self, after_ms: int = 1_000, **condition: object) -> None:
        self.now_ms += after_ms
        sample = GpuSample(
            GPU,
            energy_mj=self.energy_mj,
            condition=GpuCondition(**condition),  # type: ignore[arg-type]
        )
        note_reading(self.history, self.now_ms, sample, in_use=self.in_use)

    def fail(self) -> None:
        self.now_ms += 1_000
        sample = GpuSample(GPU, error="no answer")
        note_reading(self.history, self.now_ms, sample, in_use=self.in_use)

    @property
    def judged(self) -> GpuVerdict:
        return judge(GPU, self.history)

    def verdict(self) -> Verdict:
        return self.judged.verdict


def test_what_was_never_read_is_unknown_and_a_reading_makes_it_healthy() -> None:
    gpu = Gpu()
    assert gpu.verdict() is Verdict.UNKNOWN
    gpu.read()
    assert gpu.judged == GpuVerdict(GPU, Verdict.HEALTHY)


def test_a_silent_driver_makes_it_unknown_and_never_healthy() -> None:
    gpu = Gpu()
    gpu.read()
    for _ in range(SILENT_READINGS):
        gpu.fail()
    assert gpu.verdict() is Verdict.UNKNOWN
    assert "no answer" in gpu.judged.reason
    gpu.xid(95)
    assert gpu.verdict() is Verdict.NEEDS_RESET, "what is known to be worse stays"


def test_a_gpu_whose_memory_cannot_be_read_is_unknown_with_the_reason() -> None:
    """From the start, though all else is answered; and one failure in between says nothing."""
    gpu = Gpu()
    unread = "its memory cannot be read: Unknown Error"
    gpu.read(unread=unread)
    assert gpu.judged == GpuVerdict(
        GPU, Verdict.UNKNOWN, f"is unknown: {unread}", "look at the driver: nvidia-smi"
    )
    gpu.read()
    assert gpu.verdict() is Verdict.HEALTHY
    gpu.read(unread=unread)
    assert gpu.verdict() is Verdict.HEALTHY
    gpu.read(unread=unread)
    assert gpu.verdict() is Verdict.UNKNOWN


def test_dcgm_263_a_gpu_that_needs_a_reset_is_not_called_healthy() -> None:
    """Readings that succeed mend nothing; neither does the end of the application."""
    gpu = Gpu()
    gpu.read()
    gpu.xid(95)
    gpu.in_use = False
    application_ended(gpu.history)
    for _ in range(20):
        gpu.read()
        assert gpu.verdict() is Verdict.NEEDS_RESET
    assert "xid 95" in gpu.judged.reason
    assert gpu.judged.action == "reset the GPU"


def test_dcgm_263_the_drivers_word_needs_no_xid() -> None:
    gpu = Gpu()
    gpu.read(recovery_action=1)
    assert gpu.verdict() is Verdict.NEEDS_RESET
    gpu.read(recovery_action=2)
    assert gpu.verdict() is Verdict.NEEDS_REBOOT
    gpu.read(state="reset_required")
    assert gpu.verdict() is Verdict.NEEDS_RESET


def test_dcgm_exporter_500_an_xid_does_not_stay_for_ever() -> None:
    """By its application's end, a reset that is seen, the driver's word, a day of quiet."""
    gpu = Gpu()
    gpu.read()
    gpu.xid(94)
    assert gpu.verdict() is Verdict.DEGRADED
    application_ended(gpu.history)
    assert gpu.judged == GpuVerdict(GPU, Verdict.HEALTHY)

    gpu.xid(95)
    gpu.energy_mj = 5  # it counts anew: the GPU was reset
    gpu.read(SETTLE_MS)
    assert gpu.judged == GpuVerdict(GPU, Verdict.HEALTHY)

    gpu.xid(95)
    gpu.read(SETTLE_MS, recovery_action=0)
    assert gpu.judged == GpuVerdict(GPU, Verdict.HEALTHY)

    gpu.xid(999)
    assert gpu.verdict() is Verdict.DEGRADED
    gpu.read(QUIET_MS)
    assert gpu.judged == GpuVerdict(GPU, Verdict.HEALTHY)

    gpu.xid(95)
    driver_loaded(gpu.history)
    assert gpu.judged == GpuVerdict(GPU, Verdict.HEALTHY)


def test_the_drivers_word_from_just_after_the_error_does_not_close_it() -> None:
    gpu = Gpu()
    gpu.read(recovery_action=0)
    gpu.xid(95)
    gpu.read(SETTLE_MS - 1, recovery_action=0)
    assert gpu.verdict() is Verdict.NEEDS_RESET


def test_fallen_off_the_bus_is_lost_by_either_witness() -> None:
    gpu = Gpu()
    gpu.read()
    gpu.xid(79)
    assert gpu.verdict() is Verdict.LOST
    other = Gpu()
    other.read(state="lost")
    assert other.verdict() is Verdict.LOST
    assert other.judged.action == "reboot the node"
    other.read(SETTLE_MS)
    assert other.verdict() is Verdict.HEALTHY, "it answers again"


def test_what_the_driver_asks_for_counts_and_not_the_table() -> None:
    """Where it says so after the error; a reset of one GPU spares its node a reboot."""
    gpu = Gpu()
    gpu.read(recovery_action=1)
    gpu.xid(79)
    gpu.read(SETTLE_MS - 1, recovery_action=1)
    assert gpu.verdict() is Verdict.LOST, "its word may be from before"
    gpu.read(recovery_action=1)
    assert gpu.verdict() is Verdict.NEEDS_RESET
    assert "recovery action 1" in gpu.judged.reason
    assert [record.code for record in gpu.judged.xids] == [79]
    gpu.read(recovery_action=9)
    assert gpu.verdict() is Verdict.LOST, "what it asks for is not understood"
    gpu.read(recovery_action=0)
    assert gpu.verdict() is Verdict.HEALTHY


def test_xid_154_says_itself_what_is_needed_and_when_no_more() -> None:
    gpu = Gpu()
    gpu.read()
    gpu.xid(154, source="nvml")
    assert gpu.verdict() is Verdict.DEGRADED, "NVML tells no text"
    gpu.xid(154, RESET_REQUIRED)
    assert gpu.verdict() is Verdict.NEEDS_RESET
    gpu.xid(95)
    gpu.xid(154, NONE_REQUIRED)
    assert gpu.judged == GpuVerdict(GPU, Verdict.HEALTHY)
    assert recovery_action("changed from 0x0 (None) to 0x2 (Node Reboot Required)") == 2
    assert recovery_action("changed from 0x0 (None) to 0x4 (Drain and Reset)") == 4
    assert recovery_action("something else") is None


def test_rows_of_memory_degrade() -> None:
    gpu = Gpu()
    gpu.read(rows_pending=True)
    assert gpu.verdict() is Verdict.DEGRADED
    gpu.read(rows_failed=True, rows_pending=True)
    assert "failed" in gpu.judged.reason
    gpu.read(rows_failed=False, rows_pending=False)
    assert gpu.verdict() is Verdict.HEALTHY


def test_gpud_351_a_4090_without_any_of_this_is_healthy() -> None:
    gpu = Gpu()
    gpu.read(recovery_action=None, rows_failed=False, rows_pending=None)
    assert gpu.verdict() is Verdict.HEALTHY


def test_a_storm_is_one_record_with_a_count() -> None:
    gpu = Gpu()
    firsts = []
    for _ in range(11_760):
        gpu.now_ms += 3
        firsts.append(gpu.xid(95))
    (record,) = gpu.judged.xids
    assert record.count == 11_760
    assert record.last_unix_ms - record.first_unix_ms == 11_759 * 3
    assert firsts.count(True) == 1


def test_codes_beyond_the_bound_are_not_kept() -> None:
    gpu = Gpu()
    for code in range(200, 400):
        gpu.xid(code)
    assert len(gpu.judged.xids) == 32


@given(
    st.lists(st.tuples(st.integers(0, 3 * SAME_MS), st.sampled_from(["both", "nvml", "kernel"])))
)
def test_both_witnesses_of_an_error_count_once(errors: list[tuple[int, str]]) -> None:
    """Never more than there were; and exactly as many where both always speak, or one alone."""
    gpu = Gpu()
    for after_ms, witness in errors:
        gpu.now_ms += after_ms
        for source in ("nvml", "kernel"):
            if witness in (source, "both"):
                gpu.xid(95, source=source)
    count = gpu.judged.xids[0].count if errors else 0
    assert count <= len(errors)
    if len({witness for _, witness in errors}) == 1:
        assert count == len(errors)


STEPS = st.one_of(
    st.tuples(st.just("xid"), st.sampled_from([63, 79, 94, 95, 154, 999])),
    st.tuples(st.just("read"), st.sampled_from([None, 0, 1, 2, 9])),
    st.tuples(st.just("fail"), st.just(0)),
    st.tuples(st.just("end"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 2 * SETTLE_MS)),
)


@given(st.lists(STEPS, max_size=40))
def test_no_history_is_called_healthy_while_a_witness_objects(
    steps: list[tuple[str, int | None]],
) -> None:
    """A picture of our own: which errors need a reset, and what could have mended them since."""
    gpu = Gpu()
    open_since: dict[int, int] = {}
    asked: int | None = None
    answered, failures, read_ms = False, 0, 0
    for kind, value in steps:
        if kind == "xid" and value is not None:
            gpu.xid(value)
            if value in (79, 95):
                open_since[value] = gpu.now_ms
        elif kind == "read":
            mended = value == 0 or (value is None and bool(asked))
            gpu.read(recovery_action=value)
            asked, answered, failures, read_ms = value, True, 0, gpu.now_ms
            if mended:
                settled = gpu.now_ms - SETTLE_MS
                open_since = {c: at for c, at in open_since.items() if at > settled}
        elif kind == "fail":
            gpu.fail()
            failures += 1
        elif kind == "end":
            application_ended(gpu.history)
        elif kind == "wait" and value is not None:
            gpu.now_ms += value
        verdict = gpu.verdict()
        if open_since or asked:
            assert verdict is not Verdict.HEALTHY
        if 95 in open_since:
            assert SEVERITY.index(verdict) >= SEVERITY.index(Verdict.NEEDS_RESET)
        if 79 in open_since and (asked not in (1, 2) or read_ms < open_since[79] + SETTLE_MS):
            assert verdict is Verdict.LOST
        if not answered or failures >= SILENT_READINGS:
            assert SEVERITY.index(verdict) >= SEVERITY.index(Verdict.UNKNOWN)
    # Liveness: a reset and the end of the application mend whatever there was.
    application_ended(gpu.history)
    gpu.read(QUIET_MS, recovery_action=0)
    assert gpu.verdict() is Verdict.HEALTHY


def test_an_error_of_the_last_moment_before_a_reset_is_over_too() -> None:
    """On an older driver, which has no recovery action that would say so later."""
    history = GpuHistory()
    reset_required = GpuSample("g", condition=GpuCondition(state="reset_required"))
    well = GpuSample("g", condition=GpuCondition())
    note_reading(history, 11_000, reset_required, in_use=False)
    note_xid(history, 14_000, XidSeen(95, "kernel", 14_000), TABLE)
    note_reading(history, 15_000, well, in_use=False)
    assert judge("g", history).verdict is Verdict.NEEDS_RESET, "it may be from after the reset"
    note_reading(history, 20_000, well, in_use=False)
    assert judge("g", history).verdict is Verdict.HEALTHY


def test_no_number_of_errors_hides_a_worse_one() -> None:
    gpu = Gpu()
    for code in range(200, 200 + CASES_MAX):
        assert gpu.xid(code)
    assert gpu.xid(79)
    assert judge(GPU, gpu.history).verdict is Verdict.LOST
    assert len(gpu.history.cases) == CASES_MAX
    assert not gpu.xid(300), "it says nothing that the others do not"
