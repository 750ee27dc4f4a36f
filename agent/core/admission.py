"""What may start on this node, beside what runs here and after what ran here.

Problem: an order to start may come twice, late, or after its own stop, and the one before it may
not have left yet. Attempts of one job share nothing but their history, so there is one at a time;
but the ranks of a gang are attempts of one job and one epoch, and stand beside one another. So
attempts are told apart by epoch and rank (`AttemptId.may_run_beside`), and what must not start any
more is remembered by rank as well (`state.PutFence`).

Whether shares of a GPU add up is the coordinator's to see to; but it may not know yet of all that
runs here. So it is counted again (`shares.py`), since a GPU that is promised twice costs both jobs.
"""

from agent.core import clean, shares
from agent.core.attempt import AttemptRecord
from agent.core.ids import AttemptId, parse_attempt_id
from agent.core.state import SPOOL_MAX, State


def is_past(state: State, named: AttemptId) -> bool:
    """Whether this attempt, or one that can only have been ordered after it, is or was here."""
    known = [parse_attempt_id(one) for one in state.attempts]
    return state.is_fenced(named) or any(
        other == named or (other.epoch >= named.epoch and not other.may_run_beside(named))
        for other in known
    )


def why_not(state: State, record: AttemptRecord) -> str:
    """The sentence that says why this attempt cannot start here now; empty when it can."""
    if len(state.spool) >= SPOOL_MAX:
        return f"{len(state.spool)} events wait for the coordinator; this node takes no more work"
    named = parse_attempt_id(record.id)
    here = {gpu.uuid: True for gpu in state.gpus}
    for uuid in record.gpu_uuids:
        if uuid not in here:
            return f"{state.options.node} has no GPU {uuid}"
    if leak := clean.why_not(state, record.gpu_uuids):
        return leak
    for other in state.attempts.values():
        if other.record.id == record.id or not other.live:
            continue
        if not named.may_run_beside(parse_attempt_id(other.record.id)):
            return f"attempt {other.record.id} of the same job has not left yet"
        for uuid in other.record.gpu_uuids:
            if uuid in record.gpu_uuids and not shares.stand_together(record, other.record):
                return f"GPU {uuid} is still held by attempt {other.record.id}"
    return shares.why_not(state, record)
