"""Whether a GPU is clean again after an attempt, and what follows when it is not.

Problem: a process that hangs in the driver, or a driver that loses count, keeps a dead job's
memory. The next job there then fails for want of memory, far away from the cause; so does the one
after it.

How: who uses a GPU is asked when nothing of ours runs on it, which is what it is compared with, and
again as soon as an attempt has ended. It is clean when no process is listed that was not there
before, and its memory is back to what it was. Until that is known, at most `CHECK_MS_MAX`, an
attempt that was ordered to start there restores its checkpoint and waits. After that the GPU leaks:
the log names the processes once (`gpu.memory_leak`), and starts are refused with the same sentence
until it is clean. An agent that is restarted takes what is there for what was there before: so an
operator says that a GPU may be used all the same, which costs no training.

What the driver does not tell (no list, no answer) is no leak: a GPU is never held for it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.core.gpu_messages import GpusInspected, InspectGpus
from agent.core.values import GpuOccupancy, Restored

if TYPE_CHECKING:
    from agent.core.attempt import LiveAttempt
    from agent.core.state import Instant, State

CHECK_MS_MAX = 15_000  # a driver that tears a full GPU down takes seconds
AGAIN_MS = 500  # a few milliseconds of the driver's lock each, and nobody trains there
LEAKING_AGAIN_MS = 10_000  # it is for a person to act
# A context takes hundreds; what the driver itself needs comes and goes by a few.
MEMORY_SLACK_BYTES = 64 * 1024**2
PIDS_NAMED_MAX = 8  # what a person looks at; the number of all stands beside them
MIB = 1024**2


@dataclass(slots=True)
class Check:
    """A GPU that an attempt has left and that was not seen clean since. `due_ms` is when it is
    asked for again, `None` while an answer is under way. `leak` is the sentence once time is over.
    """

    attempt: str
    begun_ms: int
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
    there = before.pids if before is not None and before.pids is not None else ()
    pids = tuple(pid for pid in now.pids or () if pid not in there)
    if pids:
        named = ", ".join(str(pid) for pid in pids[:PIDS_NAMED_MAX])
        count = "1 process" if len(pids) == 1 else f"{len(pids)} processes"
        return Verdict(True, f"{count} that did not use it before still do: pid {named}", pids)
    if before is not None and before.memory_used_bytes is not None:
        excess_bytes = (now.memory_used_bytes or 0) - before.memory_used_bytes
        if excess_bytes > MEMORY_SLACK_BYTES:
            least = f"{before.memory_used_bytes // MIB} MiB"
            used = f"{(now.memory_used_bytes or 0) // MIB} MiB"
            return Verdict(True, f"{used} of its memory are used, {least} were before, by nobody")
    return Verdict(known=True)


def begin_idle(state: "State") -> None:
    """After a start of the agent: see what the GPUs are like that nothing of ours runs on."""
    idle = tuple(gpu.uuid for gpu in state.gpus if not _is_held(state, gpu.uuid))
    if idle:
        state.commands.append(InspectGpus(idle))


def begin(state: "State", now: "Instant", live: "LiveAttempt") -> None:
    """The attempt has ended: its GPUs have to be seen clean."""
    here = {gpu.uuid: True for gpu in state.gpus}
    uuids = tuple(
        uuid for uuid in live.record.gpu_uuids if uuid in here and not _is_held(state, uuid)
    )
    for uuid in uuids:
        state.checks[uuid] = Check(live.record.id, now.now_ms)
        for before in live.record.gpus_before:
            if before.uuid == uuid:
                state.idle_occupancies[uuid] = before
    if uuids:
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
        elif not _is_held(state, found.uuid) and judge(None, found).known:
            state.idle_occupancies[found.uuid] = found
    ready = []
    for live in state.attempts.values():
        if live.restored is not None and not is_pending(state, live.record.gpu_uuids):
            ready.append((live, live.restored))
            live.restored = None
    return ready


def _decide(state: "State", now: "Instant", check: Check, found: GpuOccupancy) -> None:
    uuid = found.uuid
    verdict = judge(state.idle_occupancies.get(uuid), found)
    waited_ms = now.now_ms - check.begun_ms
    if verdict.known and not verdict.reason:
        del state.checks[uuid]
        state.idle_occupancies[uuid] = found
        if check.leak:
            state.log("info", "gpu.clean", gpu=uuid, attempt=check.attempt, after_ms=waited_ms)
        return
    if waited_ms < CHECK_MS_MAX:
        check.due_ms = now.now_ms + AGAIN_MS
        return
    if not verdict.known and not check.leak:
        del state.checks[uuid]
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


def next_check_ms(state: "State") -> int | None:
    """When a GPU is to be asked for again."""
    due = (check.due_ms for check in state.checks.values())
    return min((due_ms for due_ms in due if due_ms is not None), default=None)


def check_again(state: "State", now: "Instant") -> None:
    """Ask for those whose time has come."""
    late = [
        (uuid, check)
        for uuid, check in state.checks.items()
        if check.due_ms is not None and check.due_ms <= now.now_ms
    ]
    for _, check in late:
        check.due_ms = None
    if late:
        state.commands.append(InspectGpus(tuple(uuid for uuid, _ in late)))


def _is_held(state: "State", uuid: str) -> bool:
    return any(live.live and uuid in live.record.gpu_uuids for live in state.attempts.values())
