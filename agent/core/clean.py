"""Whether a GPU is clean again after an attempt, and what follows when it is not.

Problem: a process that hangs in the driver, or a driver that loses count, keeps a dead job's
memory. The next job there then fails for want of memory, far away from the cause; so does the one
after it.

How: who uses a GPU is asked when nothing of ours runs on it, until the driver says, which is what
it is compared with, and again as soon as an attempt has ended. Until it is known to be clean, at
most `CHECK_MS_MAX`, an attempt that was ordered to start there restores its checkpoint and waits.
After that the GPU leaks: the log names the processes once (`gpu.memory_leak`), and starts are
refused with the same sentence until it is clean.

The rule: a GPU leaks when more of its memory is used than before, and no other service has it. What
processes of other services hold (a display server, a monitor; `telemetry/services.py`) is never
counted, so they may come, grow and begin anew with another pid. Whoever else is listed is named,
and is no leak by itself. Only where memory is not told does a new process make one, as it cannot be
of another service. Without anything to compare with there is no leak; nor is one what the driver
does not tell (no list, no answer, none in time): a GPU is never held for that.

What was left and not seen clean is in the journal with what it is compared with, so a restart does
not take a leftover for what was there before. It is forgotten by a boot, which leaves nothing
behind, and by a person (`agent/waiver.py`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.core.gpu_messages import GpuLeft, GpusInspected, InspectGpus, PutGpusLeft
from agent.core.values import GpuOccupancy, Restored

if TYPE_CHECKING:
    from agent.core.attempt import LiveAttempt
    from agent.core.state import Instant, State

CHECK_MS_MAX = 15_000  # a driver that tears a full GPU down takes seconds
# An answer that is under way when time is over may still say that all is well.
NO_ANSWER_MS_MAX = CHECK_MS_MAX + 1_000
AGAIN_MS = 500  # a few milliseconds of the driver's lock each, and nobody trains there
LEAKING_AGAIN_MS = 10_000  # it is for a person to act
IDLE_AGAIN_MS = 5_000  # a driver that was slow when we began
# A context takes hundreds; what the driver itself needs comes and goes by a few.
MEMORY_SLACK_BYTES = 64 * 1024**2
PIDS_NAMED_MAX = 8  # what a person looks at; the number of all stands beside them
MIB = 1024**2


@dataclass(slots=True)
class Check:
    """A GPU that an attempt has left and that was not seen clean since, and what it is compared
    with. `due_ms` is when it is asked for again, `None` while an answer is under way. `leak` is the
    sentence once time is over."""

    attempt: str
    begun_ms: int
    before: GpuOccupancy | None = None
    due_ms: int | None = None
    leak: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`known`: the driver told enough to say. `reason` is empty for a clean GPU."""

    known: bool
    reason: str = ""
    pids: tuple[int, ...] = ()


def judge(before: GpuOccupancy | None, now: GpuOccupancy) -> Verdict:
    """Whether a GPU that nothing of ours runs on is as it was."""
    if now.pids is None and now.memory_used_bytes is None:
        return Verdict(known=False)
    if before is None:
        return Verdict(known=True)
    pids: tuple[int, ...] = ()
    if before.pids is not None:
        pids = tuple(pid for pid in now.pids or () if pid not in before.pids)
    who = "by nobody"
    if pids:
        named = ", ".join(str(pid) for pid in pids[:PIDS_NAMED_MAX])
        count = "1 process" if len(pids) == 1 else f"{len(pids)} processes"
        who = f"{count} that did not use it before still do: pid {named}"
    if before.memory_used_bytes is None or now.memory_used_bytes is None:
        return Verdict(True, who, pids) if pids else Verdict(known=True)
    if now.memory_used_bytes - before.memory_used_bytes <= MEMORY_SLACK_BYTES:
        return Verdict(known=True)
    least, used = before.memory_used_bytes // MIB, now.memory_used_bytes // MIB
    return Verdict(True, f"{used} MiB of its memory are used, {least} MiB were before, {who}", pids)


def begin_idle(state: "State", now: "Instant", uuids: tuple[str, ...]) -> None:
    """These GPUs have become known: see what those are like that nothing of ours runs on, and go on
    with those that were not clean when the agent before this one went."""
    assert state.host is not None
    for uuid in uuids:
        left = state.gpus_left.pop(uuid, None)
        if left is not None and left.boot_id == state.host.boot_id:
            state.checks[uuid] = Check(left.attempt, now.now_ms, left.before)
        elif left is not None:
            _remember(state)
    asked = tuple(uuid for uuid in uuids if uuid in state.checks or not _is_held(state, uuid))
    if asked:
        state.commands.append(InspectGpus(asked))


def _remember(state: "State") -> None:
    """Keep what is not seen clean yet for an agent that comes after this one."""
    boot_id = state.host.boot_id if state.host is not None else ""
    fresh = tuple(
        GpuLeft(uuid, check.attempt, boot_id, check.before) for uuid, check in state.checks.items()
    )
    state.records.append(PutGpusLeft((*state.gpus_left.values(), *fresh)))


def begin(state: "State", now: "Instant", live: "LiveAttempt") -> None:
    """The attempt has ended: its GPUs have to be seen clean."""
    here = {gpu.uuid: True for gpu in state.gpus}
    uuids = tuple(
        uuid for uuid in live.record.gpu_uuids if uuid in here and not _is_held(state, uuid)
    )
    for uuid in uuids:
        known = {before.uuid: before for before in live.record.gpus_before}
        before = known.get(uuid, state.idle_occupancies.get(uuid))
        state.checks[uuid] = Check(live.record.id, now.now_ms, before)
    if uuids:
        _remember(state)
        state.commands.append(InspectGpus(uuids))


def before(state: "State", gpu_uuids: tuple[str, ...]) -> tuple[GpuOccupancy, ...]:
    """What is kept with an attempt of the GPUs that it gets, since the agent may be restarted."""
    return tuple(
        state.idle_occupancies[uuid] for uuid in gpu_uuids if uuid in state.idle_occupancies
    )


def is_pending(state: "State", gpu_uuids: tuple[str, ...]) -> bool:
    """Whether it is not known yet if these GPUs are clean."""
    return any(uuid in state.checks and not state.checks[uuid].leak for uuid in gpu_uuids)


def why_not(state: "State", gpu_uuids: tuple[str, ...]) -> str:
    """The sentence of the first of these GPUs that leaks; empty when none does."""
    leaks = (state.checks[uuid].leak for uuid in gpu_uuids if uuid in state.checks)
    return next((leak for leak in leaks if leak), "")


def inspected(
    state: "State", now: "Instant", event: GpusInspected
) -> list[tuple["LiveAttempt", Restored]]:
    """The driver has answered, as far as it does. Returns the attempts that need not wait on."""
    for found in event.occupancies:
        check = state.checks.get(found.uuid)
        if check is not None:
            _decide(state, now, check, found)
        elif found.uuid not in state.idle_occupancies and not _is_held(state, found.uuid):
            if judge(None, found).known:
                state.idle_occupancies[found.uuid] = found
            else:
                state.idle_due_ms = now.now_ms + IDLE_AGAIN_MS
    return _ready(state)


def _ready(state: "State") -> list[tuple["LiveAttempt", Restored]]:
    ready = []
    for live in state.attempts.values():
        if live.restored is not None and not is_pending(state, live.record.gpu_uuids):
            ready.append((live, live.restored))
            live.restored = None
    return ready


def _decide(state: "State", now: "Instant", check: Check, found: GpuOccupancy) -> None:
    uuid = found.uuid
    verdict = judge(check.before, found)
    waited_ms = now.now_ms - check.begun_ms
    if verdict.known and not verdict.reason:
        _forget(state, uuid)
        state.idle_occupancies[uuid] = found
        if check.leak:
            state.log("info", "gpu.clean", gpu=uuid, attempt=check.attempt, after_ms=waited_ms)
        return
    if waited_ms < CHECK_MS_MAX:
        check.due_ms = now.now_ms + AGAIN_MS
        return
    if not verdict.known and not check.leak:
        _forget(state, uuid)
        reason = "the driver says neither who uses it nor how much of its memory is used"
        state.log("warning", "gpu.not_checked", gpu=uuid, attempt=check.attempt, reason=reason)
        return
    check.due_ms = now.now_ms + LEAKING_AGAIN_MS
    if not check.leak:
        check.leak = (
            f"GPU {uuid} is not clean {waited_ms // 1000} s after attempt {check.attempt}: "
            f"{verdict.reason}"
        )
        state.log(
            "error",
            "gpu.memory_leak",
            gpu=uuid,
            attempt=check.attempt,
            pids=list(verdict.pids[:PIDS_NAMED_MAX]),
            pids_count=len(verdict.pids),
            reason=check.leak,
        )


def forget(state: "State", uuids: tuple[str, ...]) -> None:
    """These GPUs are no more: there is nothing to look at, and nobody waits for them."""
    if any(state.checks.pop(uuid, None) is not None for uuid in uuids):
        _remember(state)
    for uuid in uuids:
        state.idle_occupancies.pop(uuid, None)


def _forget(state: "State", uuid: str) -> None:
    del state.checks[uuid]
    _remember(state)


def next_check_ms(state: "State") -> int | None:
    """When a GPU is to be asked for again, or has been waited for long enough."""
    due = [_next_ms(check) for check in state.checks.values()]
    return min((ms for ms in (state.idle_due_ms, *due) if ms is not None), default=None)


def _next_ms(check: Check) -> int | None:
    if check.due_ms is None and not check.leak:
        return check.begun_ms + NO_ANSWER_MS_MAX
    return check.due_ms


def check_again(state: "State", now: "Instant") -> list[tuple["LiveAttempt", Restored]]:
    """Ask for those whose time has come. Returns the attempts that need not wait on."""
    _look_again(state, now)
    for uuid, check in list(state.checks.items()):
        if check.due_ms is None and not check.leak and (_next_ms(check) or 0) <= now.now_ms:
            _forget(state, uuid)
            reason = f"the driver has not answered within {NO_ANSWER_MS_MAX // 1000} s"
            state.log("warning", "gpu.not_checked", gpu=uuid, attempt=check.attempt, reason=reason)
    late = [
        (uuid, check)
        for uuid, check in state.checks.items()
        if check.due_ms is not None and check.due_ms <= now.now_ms
    ]
    for _, check in late:
        check.due_ms = None
    if late:
        state.commands.append(InspectGpus(tuple(uuid for uuid, _ in late)))
    return _ready(state)


def _look_again(state: "State", now: "Instant") -> None:
    """At idle GPUs that the driver has said nothing of yet."""
    if state.idle_due_ms is None or state.idle_due_ms > now.now_ms:
        return
    state.idle_due_ms = None
    unknown = tuple(
        gpu.uuid
        for gpu in state.gpus
        if gpu.uuid not in state.idle_occupancies
        and gpu.uuid not in state.checks
        and not _is_held(state, gpu.uuid)
    )
    if unknown:
        state.commands.append(InspectGpus(unknown))


def _is_held(state: "State", uuid: str) -> bool:
    return any(live.live and uuid in live.record.gpu_uuids for live in state.attempts.values())
