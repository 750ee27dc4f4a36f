"""The torture's own checks: books that are wrong are found wrong.

A torture that cannot find a lost submission would report none, whatever it killed. So each of its
checks is shown the mistake that it is there for.
"""

from typing import Any

from protos.baton.v1 import types_pb2
from tests.e2e.agent_faults import STEPS, STOP_S_MAX, Audit
from tests.e2e.torture import Books, compare

TOLD = [("client-0-0", 1), ("client-0-1", 2)]
STORED = [(1, "client-0-0"), (2, "client-0-1")]


def found(stored: list[tuple[int, str]], *, told: list[tuple[str, int]] = TOLD) -> str:
    books = Books()
    books.acknowledged[0] = told
    return "\n".join(compare(books, {job_id for job_id, _ in stored}, stored))


def test_true_books_are_in_order() -> None:
    assert found(STORED) == ""
    assert found([*STORED, (3, "client-0-2")]) == "", "a job whose answer was lost is no mistake"


def test_a_lost_submission_is_found() -> None:
    assert "client-0-1 was acknowledged as job 2 and is None" in found(STORED[:1])


def test_an_id_used_twice_is_found() -> None:
    twice = [*TOLD, ("client-0-2", 2)]
    assert "job id 2 was given to client-0-1 and client-0-2" in found(STORED, told=twice)


def test_a_doubled_request_is_found() -> None:
    assert "1 requests stand for more than one job" in found([*STORED, (3, "client-0-1")])


def line(event: str, second: int, **fields: object) -> dict[str, Any]:
    return {"ts": f"2026-01-01T00:00:{second:02d}.000Z", "event": event, **fields}


def assigned(epoch: int, node: str, second: int) -> dict[str, Any]:
    return line("attempt.assigned", second, attempt=f"1.{epoch}", node=node)


def committed(epoch: int, step: int, second: int) -> dict[str, Any]:
    return line("checkpoint.committed", second, attempt=f"1.{epoch}", step=step)


def note(event: str, epoch: int, step: int, second: float = 0.0) -> dict[str, Any]:
    return {
        "event": event,
        "epoch": epoch,
        "step": step,
        "unix_ns": int((1_767_225_600 + second) * 1e9),
    }


LOG = [assigned(1, "n1", 1), committed(1, 10, 2), assigned(2, "n2", 4), committed(2, STEPS, 6)]
NOTES = [note("began", 1, 0, 1), note("began", 2, 10, 4), note("done", 2, STEPS, 6)]


def audited(log: list[dict[str, Any]], notes: list[dict[str, Any]]) -> str:
    job = types_pb2.Job(id=1, epoch=2, phase=types_pb2.JOB_PHASE_SUCCEEDED)
    return "\n".join(Audit(log).job(job, notes))


def test_a_true_handoff_is_in_order() -> None:
    assert audited(LOG, NOTES) == ""


def test_a_commit_of_an_old_copy_is_found() -> None:
    assert "came after" in audited([*LOG, committed(1, STEPS, 7)], NOTES)


def test_a_step_back_is_found() -> None:
    assert "came after" in audited([*LOG, committed(2, 20, 7)], NOTES)


def test_a_start_from_elsewhere_is_found() -> None:
    assert "began at another step than 10" in audited(LOG, [*NOTES, note("began", 2, 0, 4)])


def test_a_commit_that_is_none_is_found() -> None:
    assert "heard of a commit" in audited(LOG, [*NOTES, note("committed", 2, 77, 5)])


def test_an_old_copy_that_goes_on_is_found() -> None:
    back = line("node.up", 5, node="n1")
    late = note("tick", 1, 30, 5 + STOP_S_MAX + 1)
    assert "1.1 went on for" in audited([*LOG, back], [*NOTES, late])
    soon = note("tick", 1, 30, 5.5)
    assert audited([*LOG, back], [*NOTES, soon]) == ""


def test_an_unfinished_job_is_found() -> None:
    assert "never did its last step" in audited(LOG, NOTES[:2])
