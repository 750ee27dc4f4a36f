"""The trace of an attempt, in the words of W3C Trace Context.

Problem: what a trainer measures of itself, what Baton logs of it and what the pipeline that
submitted it shows are three stories, unless one id stands in all of them. So each attempt has a
trace: `traceparent` goes to its agent with the order to start, to the trainer as TRACEPARENT, and
its trace id into the log lines of both programs.

A job whose environment names a TRACEPARENT continues that trace, with all its attempts. Any other
attempt has one of its own. Ids are drawn from the job's request id, which its submitter made up,
with job and epoch; nothing is stored, a replay makes the same ones, and all ranks share one.

Source: https://www.w3.org/TR/trace-context/, section 3.2: version, trace id, parent id, flags; an
id of zeros is none, and version ff is forbidden.
"""

import re
from hashlib import blake2b
from typing import Final

from coordinator.core.model import Job

VARIABLE: Final = "TRACEPARENT"
SAMPLED: Final = "01"
SAMPLED_BIT: Final = 0x01
TRACE_ID_BYTES, SPAN_ID_BYTES = 16, 8
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)


def is_traceparent(text: str) -> bool:
    return _TRACEPARENT.fullmatch(text) is not None


def is_sampled(job: Job, epoch: int) -> bool:
    """Whether who submitted it wants its spans kept; one that brings no trace does."""
    return bool(int(_trace(job, epoch)[1], 16) & SAMPLED_BIT)


def span_id(job: Job, epoch: int, part: str = "") -> str:
    """16 hexadecimal digits: the attempt's span, or a part of it by name."""
    return _drawn(f"span/{part}" if part else "span", job, epoch, SPAN_ID_BYTES)


def parent_span_id(job: Job) -> str:
    """What the attempt hangs below, where its submitter said so; empty otherwise."""
    match = _given(job)
    return "" if match is None else match[2]


def trace_id(job: Job, epoch: int) -> str:
    """32 hexadecimal digits."""
    return _trace(job, epoch)[0]


def traceparent(job: Job, epoch: int) -> str:
    """What the trainer's own spans hang below: the span of this attempt."""
    trace, flags = _trace(job, epoch)
    return f"00-{trace}-{span_id(job, epoch)}-{flags}"


def _trace(job: Job, epoch: int) -> tuple[str, str]:
    match = _given(job)
    if match is not None:
        return match[1], match[3]
    return _drawn("trace", job, epoch, TRACE_ID_BYTES), SAMPLED


def _given(job: Job) -> re.Match[str] | None:
    given = next((value for name, value in job.spec.environment if name == VARIABLE), "")
    return _TRACEPARENT.fullmatch(given)


def _drawn(kind: str, job: Job, epoch: int, size_bytes: int) -> str:
    seed = f"{kind}/{job.request_id}/{job.id}/{job.submitted_unix_ms}/{epoch}"
    return blake2b(seed.encode("utf-8", "replace"), digest_size=size_bytes).hexdigest()
