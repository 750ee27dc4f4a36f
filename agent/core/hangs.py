"""What follows when a trainer hangs: its stacks into its log, then a handoff.

Problem: a hung trainer holds its GPUs and makes no progress, and killing it destroys the only
witness of why. So first every process of the attempt that can is asked to write the stacks of all
its threads (the SDK has set that up; programs without it are sent nothing), and torch's flight
recorder, in ranks that speak over NCCL, to write its dump to a file. What it would say there about
collectives that are not over, the SDK writes into the log, if its threads still run. After a pause
for that the attempt is killed, and its end says what it hung in; to the coordinator that is a
failure as any other, tried again from the last checkpoint.

Who is slow must be known, too. A node that was suspended, an agent that waited for its disk: then
the silence was ours. So while any section is watched a tick is asked for every `CHECK_MS`, and when
we come that much too late (`LATE_MS`) all time begins again. A trainer that says anything new in
the pause is not killed; the limit that it broke has been learned by then.
"""

from agent.core.attempt import LiveAttempt, Phase
from agent.core.launch import nccl_pipes
from agent.core.messages import DumpStacks
from agent.core.sections import Overdue
from agent.core.state import Instant, State
from agent.core.trainer_messages import TrainerSection

CHECK_MS = 1_000  # a hang costs minutes; to find it a second earlier is worth nothing
LATE_MS = 5_000  # what a loaded host delays a tick by is far less
# Writing stacks takes milliseconds; the flight recorder looks at its pipe about once a second, and
# writes some megabytes.
DUMP_MS = 5_000

# A job's own variable: 0 means that no section of it has a limit.
SWITCH = "BATON_HANG_LIMIT"
# Where the dump goes: `<this><rank>`; the second is the older name.
DUMPS = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def entered(state: State, now: Instant, live: LiveAttempt, said: TrainerSection) -> None:
    """A trainer has entered a section, or its connection has ended."""
    if not live.live or _variable(live, SWITCH) == "0":
        return
    if said.ended:
        live.sections.leave(said.source)
        return
    live.sections.enter(now.now_ms, said.source, said.name, said.count)
    if state.section_check_ms is None:
        state.section_check_ms = now.now_ms + CHECK_MS
    _alive(state, now, live)


def advanced(state: State, now: Instant, live: LiveAttempt, step: int) -> None:
    """Progress: whoever gets further is not hung, however large the section that it announced."""
    if live.progress is not None and step > live.progress.step:
        live.sections.advance(now.now_ms)
        _alive(state, now, live)


def check_own_lateness(state: State, now: Instant) -> None:
    """Before any event: have we been away ourselves?"""
    due_ms = state.section_check_ms
    if due_ms is None or now.now_ms - due_ms <= LATE_MS:
        return
    for live in state.attempts.values():
        live.sections.restart(now.now_ms)
    state.section_check_ms = now.now_ms + CHECK_MS


def check(state: State, now: Instant) -> None:
    """On a tick: is anybody overdue? Who has been asked to stop is not judged: the grace bounds
    that."""
    if state.section_check_ms is None or state.section_check_ms > now.now_ms:
        return
    watched = False
    for live in state.attempts.values():
        record = live.record
        watched = watched or bool(live.live and live.sections.present)
        judged = record.phase is Phase.RUNNING and not record.stop_reason and not record.exit_reason
        if judged:
            found = live.sections.overdue(now.now_ms, state.options.hang_floor_ms)
            if found is not None:
                _hung(state, now, live, found)
    state.section_check_ms = now.now_ms + CHECK_MS if watched else None


def _hung(state: State, now: Instant, live: LiveAttempt, found: Overdue) -> None:
    attempt_id = live.record.id
    taken_s, limit_s = found.taken_ms / 1000, found.limit_ms / 1000
    reason = f"hung in {found.name} for {taken_s:.0f} s (limit {limit_s:.0f} s)"
    # Journalled now: the agent may be gone when the end comes.
    state.put(live, exit_reason=f"{reason}; stacks are in its log")
    live.kill_ms = now.now_ms + DUMP_MS
    pipes = nccl_pipes(live.record, state.options.launch)
    dumps = next((value for name in DUMPS if (value := _variable(live, name))), "")
    fields: dict[str, object] = {"nccl_dump": dumps or "torch's default"} if pipes else {}
    state.log(
        "warning",
        "attempt.hung",
        attempt=attempt_id,
        section=found.name,
        seconds=taken_s,
        limit_seconds=limit_s,
        **fields,
    )
    state.commands.append(DumpStacks(attempt_id, pipes))
    state.tell(attempt_id, type="hung", reason=reason)


def _alive(state: State, now: Instant, live: LiveAttempt) -> None:
    """It had been given up, and goes on: also after a restart of ours, which the reason outlives.
    As long as another of its ranks says nothing, that is not enough."""
    record = live.record
    if not record.exit_reason or record.phase is not Phase.RUNNING:
        return
    if live.sections.overdue(now.now_ms, state.options.hang_floor_ms) is not None:
        return
    state.log("info", "attempt.recovered", attempt=record.id, reason=record.exit_reason)
    state.put(live, exit_reason="")
    if not record.stop_reason:
        live.kill_ms = None


def _variable(live: LiveAttempt, name: str) -> str:
    return dict(live.record.spec.environment).get(name, "")
