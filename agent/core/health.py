"""What is wrong with a GPU, and what would mend it: one verdict, from everything that is known.

Problem: four witnesses speak of one GPU. The driver's errors (XIDs) say what happened and never
that it is over: an exporter that repeats the last one reports a mended GPU as broken for ever
(NVIDIA/dcgm-exporter #500). The driver's own word on what is needed (NVML's field 230, the
recovery action) is the best one, and old drivers do not have it. Row remapping tells of memory.
And a reading that fails tells of a GPU, or of the driver. Whoever believes a single one calls a GPU
healthy that needs a reset (NVIDIA/DCGM #263).

How:
1. Each XID is an open case of its GPU, one a code: first, last, count. The same error comes from
   NVML and from the kernel's log; within `SAME_MS` both tell of the same ones, so the larger count
   of the two is theirs.
2. A case is closed by what mends it, and by nothing else: an application's error by the end of the
   application; one that needs a reset or a reboot by a reset that is seen (the GPU answers again
   after it did not, its recovery action is gone, its energy counter began anew, the driver was
   loaded), or by the driver's word, read a while (`SETTLE_MS`) after the error, that nothing is
   needed; what somebody has to look at, also by a day of quiet.
3. The verdict is the worst that any witness says; but what the driver itself asks for, read a
   while after an error, counts instead of the table. A driver that is silent makes it *unknown*,
   unless something worse than degraded is known: silence heals nothing, and says nothing of health.

Source: NVIDIA, Xid Errors, and GPU memory error management (docs.nvidia.com/deploy).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from agent.core.values import GpuCondition, GpuSample, XidSeen

# Both witnesses of an error speak within milliseconds; a reader that had to wait, within seconds.
SAME_MS = 5_000
# The driver changes its recovery action together with the XID or a moment later; a word that is
# older than this after the error may be from before it.
SETTLE_MS = 5_000
# What somebody has to look at is looked at within a day, or was nothing.
QUIET_MS = 86_400_000
# Readings in a row that fail before a driver is called silent: one deadline is missed under load.
SILENT_READINGS = 2
# More codes than this on one GPU say nothing more, unless they are worse; there are some 200.
CASES_MAX = 32
TEXT_CHARACTERS_MAX = 256


class Action(Enum):
    """What an XID asks for; see `xids.toml`."""

    IGNORE = "ignore"
    RESTART_APPLICATION = "restart_application"
    INSPECT = "inspect"
    RESET = "reset"
    REBOOT = "reboot"
    READ = "read"


class Verdict(Enum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    NEEDS_RESET = "needs_reset"
    NEEDS_REBOOT = "needs_reboot"
    LOST = "lost"
    UNKNOWN = "unknown"


# From the best to the worst.
V = Verdict
SEVERITY = (V.HEALTHY, V.DEGRADED, V.UNKNOWN, V.NEEDS_RESET, V.NEEDS_REBOOT, V.LOST)


@dataclass(frozen=True, slots=True)
class XidRule:
    """`lost`: the GPU does not answer any more."""

    action: Action
    name: str
    lost: bool = False


@dataclass(frozen=True, slots=True)
class XidTable:
    """`unlisted` is for codes without a rule."""

    version: int
    source: str
    date: str
    unlisted: Action
    rules: Mapping[int, XidRule]

    def rule(self, code: int) -> XidRule:
        return self.rules.get(code) or XidRule(self.unlisted, "not in the table of XIDs")


NO_TABLE = XidTable(0, "none", "", Action.INSPECT, {})


@dataclass(frozen=True, slots=True)
class XidRecord:
    """All errors of one code since its case was opened; `text` is the last message."""

    code: int
    count: int
    first_unix_ms: int
    last_unix_ms: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class GpuVerdict:
    """`reason` is a sentence without its subject, "needs a reset (xid 95: ...)"; `action` says what
    to do. Both are empty where all is well."""

    uuid: str
    verdict: Verdict
    reason: str = ""
    action: str = ""
    xids: tuple[XidRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuHealthChanged:
    """An event for the coordinator: these verdicts are new."""

    gpus: tuple[GpuVerdict, ...]


@dataclass(slots=True)
class Case:
    """The errors of one code. `counts` are those of the present moment by witness, `counted` all
    before it."""

    code: int
    rule: XidRule
    first_unix_ms: int
    last_unix_ms: int
    last_ms: int
    text: str = ""
    counted: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def record(self) -> XidRecord:
        count = self.counted + max(self.counts.values(), default=0)
        return XidRecord(self.code, count, self.first_unix_ms, self.last_unix_ms, self.text)

    @property
    def action(self) -> Action:
        if self.rule.action is not Action.READ:
            return self.rule.action
        said = recovery_action(self.text)
        return Action.INSPECT if said is None else _RECOVERY.get(said, _STRANGE)[0]

    def add(self, now_ms: int, seen: XidSeen) -> None:
        if now_ms - self.last_ms > SAME_MS:
            self.counted += max(self.counts.values(), default=0)
            self.counts.clear()
        self.counts[seen.source] = self.counts.get(seen.source, 0) + seen.count
        self.last_ms = max(self.last_ms, now_ms)
        self.first_unix_ms = min(self.first_unix_ms, seen.since_unix_ms)
        self.last_unix_ms = max(self.last_unix_ms, seen.unix_ms)
        self.text = seen.text[:TEXT_CHARACTERS_MAX] or self.text


@dataclass(slots=True)
class GpuHistory:
    """What is known of one GPU since this agent began. Times are monotonic."""

    cases: dict[int, Case] = field(default_factory=dict)
    condition: GpuCondition | None = None
    read_ms: int = 0
    failures: int = SILENT_READINGS  # nothing was read yet
    energy_mj: int | None = None
    error: str = "it was not read yet"
    reset_ms: int | None = None  # when a reset was seen
    sequence: int | None = None  # the last record of the kernel's log that tells of it


@dataclass(slots=True)
class Watched:
    """By UUID: all that is known, and what was told last. `told_ms` is of the last event. `ill` has
    an open case; `mended` is the last record of the kernel's log that is over, in this boot.
    `strangers` are errors of what is no GPU here yet, by UUID or bus and by code, with when they
    were told."""

    histories: dict[str, GpuHistory] = field(default_factory=dict)
    told: dict[str, GpuVerdict] = field(default_factory=dict)
    told_ms: int = 0
    ill: dict[str, bool] = field(default_factory=dict)
    mended: dict[str, int] = field(default_factory=dict)
    strangers: dict[str, dict[int, tuple[int, XidSeen]]] = field(default_factory=dict)

    def forget(self, uuids: Iterable[str]) -> None:
        """These GPUs are no more."""
        for uuid in uuids:
            self.histories.pop(uuid, None)
            self.told.pop(uuid, None)
            self.ill.pop(uuid, None)


_RECOVERY: Mapping[int, tuple[Action, Verdict, str, str]] = {
    0: (Action.IGNORE, V.HEALTHY, "", ""),
    1: (Action.RESET, V.NEEDS_RESET, "needs a reset", "reset the GPU"),
    2: (Action.REBOOT, V.NEEDS_REBOOT, "needs a reboot of the node", "reboot the node"),
    # Its neighbours must not speak to it; all of a job's work on it has to end for that.
    3: (
        Action.RESET, V.NEEDS_RESET, "must be left by its peers",
        "drain the GPU; then look again what the driver asks for",
    ),
    4: (
        Action.RESET, V.NEEDS_RESET, "must be left by its peers, and needs a reset",
        "drain the GPU, then reset it",
    ),
    5: (
        Action.INSPECT, V.DEGRADED, "has lost its memory domain (IMEX)",
        "recover the IMEX domain",
    ),
    6: (Action.RESET, V.NEEDS_RESET, "needs a reset of its bus", "reset the GPU's PCIe bus"),
    7: (Action.REBOOT, V.NEEDS_REBOOT, "needs a reboot of the system", "reboot the system"),
}  # fmt: skip
_STRANGE = (
    Action.INSPECT, V.DEGRADED, "asks for something that this agent does not know",
    "look at the GPU's recovery action: nvidia-smi -q",
)  # fmt: skip
_ASKED = re.compile(r"changed from 0x[0-9a-fA-F]+.*? to 0x([0-9a-fA-F]{1,4})\b")


def recovery_action(text: str) -> int | None:
    """What the message of XID 154 changes the action to, e.g. "GPU recovery action changed from 0x0
    (None) to 0x1 (GPU Reset Required)"; `None` where it does not say."""
    found = _ASKED.search(text)
    return int(found[1], 16) if found else None


# --- what happens ---------------------------------------------------------------------------------


def note_xid(history: GpuHistory, now_ms: int, seen: XidSeen, table: XidTable) -> bool:
    """Take in an error of `now_ms`; whether it is the first of its case."""
    case = history.cases.get(seen.code)
    first = case is None
    if case is None:
        rule = table.rule(seen.code)
        case = Case(seen.code, rule, seen.unix_ms, seen.unix_ms, now_ms, seen.text)
        if len(history.cases) >= CASES_MAX and not _put_out_a_milder_one(history, case):
            return False
        history.cases[seen.code] = case
    case.add(now_ms, seen)
    if case.rule.action is Action.READ and recovery_action(seen.text) == 0:
        # The driver says itself that nothing is needed any more.
        _close(history, (Action.RESET, Action.REBOOT, Action.READ))
    return first


def _put_out_a_milder_one(history: GpuHistory, fresh: Case) -> bool:
    """So that no number of errors hides a worse one; the oldest of the mildest goes."""
    mildest = min(history.cases.values(), key=lambda case: (_severity(case), case.last_ms))
    if _severity(mildest) >= _severity(fresh):
        return False
    del history.cases[mildest.code]
    return True


def note_reading(history: GpuHistory, now_ms: int, sample: GpuSample, *, in_use: bool) -> None:
    """A reading, or the failure of one. `in_use`: an application of ours is on the GPU."""
    if not in_use:
        _close(history, (Action.RESTART_APPLICATION,), before_ms=now_ms - SETTLE_MS)
    _close(history, (Action.INSPECT, Action.IGNORE), before_ms=now_ms - QUIET_MS)
    condition = sample.condition
    if condition is None:
        history.failures += 1
        history.error = sample.error or "the driver does not say how it is"
        return
    before, energy_mj = history.condition, history.energy_mj
    history.condition, history.read_ms = condition, now_ms
    # A driver that gives an unknown error for its memory has not said that the GPU is well.
    history.failures = history.failures + 1 if condition.unread else 0
    history.error = condition.unread
    if sample.energy_mj is not None:
        history.energy_mj = sample.energy_mj
    anew = sample.energy_mj is not None and sample.energy_mj < (energy_mj or 0)
    well = not condition.state and not condition.recovery_action
    ill = before is not None and (before.state != "" or bool(before.recovery_action))
    if well and (ill or anew):
        history.reset_ms = now_ms
        _close(history, tuple(Action), before_ms=now_ms - SETTLE_MS)
    if not well:
        history.reset_ms = None
    if history.reset_ms is not None and now_ms - history.reset_ms >= SETTLE_MS:
        # It is well still: the errors of the last moments before the reset are over as well.
        _close(history, tuple(Action), before_ms=history.reset_ms)
        history.reset_ms = None
    if not condition.state and condition.recovery_action == 0:
        needs = (Action.RESET, Action.REBOOT, Action.READ)
        _close(history, needs, before_ms=now_ms - SETTLE_MS)


def application_ended(history: GpuHistory) -> None:
    """Nothing of ours is on the GPU any more."""
    _close(history, (Action.RESTART_APPLICATION,))


def driver_loaded(history: GpuHistory) -> None:
    """A fresh driver initialises every GPU; what was before it is over."""
    history.cases.clear()


def _close(
    history: GpuHistory, actions: tuple[Action, ...], *, before_ms: int | None = None
) -> None:
    for code, case in list(history.cases.items()):
        late = before_ms is None or case.last_ms <= before_ms
        if late and (case.rule.action in actions or case.action in actions):
            del history.cases[code]


# --- the verdict ----------------------------------------------------------------------------------


def judge(uuid: str, history: GpuHistory) -> GpuVerdict:
    """The worst of what all witnesses say."""
    # Of those that say the same the first is told: the latest error, which says most.
    cases = sorted(history.cases.values(), key=lambda case: -case.last_ms)
    found = [_of_case(case) for case in cases if not _is_overruled(case, history)]
    found += [_of_condition(history.condition), _of_rows(history.condition)]
    if history.failures >= SILENT_READINGS:
        why = f"is unknown: {history.error}"
        found.append((V.UNKNOWN, why, "look at the driver: nvidia-smi"))
    worst = max(found, key=lambda item: SEVERITY.index(item[0]))
    records = tuple(case.record for case in history.cases.values())
    return GpuVerdict(uuid, *worst, xids=records)


def is_open(history: GpuHistory) -> bool:
    """Whether anything is open that says more than nothing."""
    return any(case.action is not Action.IGNORE for case in history.cases.values())


_Finding = tuple[Verdict, str, str]
_WELL: _Finding = (V.HEALTHY, "", "")


def _is_overruled(case: Case, history: GpuHistory) -> bool:
    """Whether the driver itself has said since, and not only just after, what is needed: that
    counts and not the table, also where it asks for less. A GPU that says so is on its bus."""
    said = history.condition
    if said is None or case.action not in (Action.RESET, Action.REBOOT, Action.READ):
        return False
    asks = _of_condition(said)[0] in (V.NEEDS_RESET, V.NEEDS_REBOOT)
    return bool(said.recovery_action) and asks and history.read_ms - case.last_ms >= SETTLE_MS


def _of_condition(condition: GpuCondition | None) -> _Finding:
    if condition is None:
        return _WELL
    if condition.state == "lost":
        return V.LOST, "has fallen off the bus (NVML)", "reboot the node"
    asked = condition.recovery_action
    if not asked and condition.state == "reset_required":
        return V.NEEDS_RESET, "needs a reset (NVML)", "reset the GPU"
    if asked:
        _, verdict, reason, action = _RECOVERY.get(asked, _STRANGE)
        return verdict, f"{reason} (NVML's recovery action {asked})", action
    return _WELL


def _of_rows(condition: GpuCondition | None) -> _Finding:
    if condition is not None and condition.rows_failed:
        reason = "has failed to remap a row of its memory"
        return V.DEGRADED, reason, "have the GPU examined, and replaced if it is confirmed"
    if condition is not None and condition.rows_pending:
        return V.DEGRADED, "will remap a row at its next reset", "reset the GPU when it is idle"
    return _WELL


def _severity(case: Case) -> int:
    return SEVERITY.index(_of_case(case)[0])


def _of_case(case: Case) -> _Finding:
    why = f"(xid {case.code}: {case.rule.name})"
    if case.rule.lost:
        return V.LOST, f"is lost {why}", "reboot the node"
    match case.action:
        case Action.RESET:
            return V.NEEDS_RESET, f"needs a reset {why}", "reset the GPU"
        case Action.REBOOT:
            return V.NEEDS_REBOOT, f"needs a reboot of the node {why}", "reboot the node"
        case Action.RESTART_APPLICATION:
            return V.DEGRADED, f"has stopped its application {why}", "restart the application"
        case Action.INSPECT | Action.READ:
            return V.DEGRADED, f"has to be looked at {why}", "look at the kernel's log"
    return _WELL
