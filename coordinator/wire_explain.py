"""What `baton explain` is told, on the wire: what nobody knows is absent."""

from coordinator.core.explanations import Explanation
from protos.baton.v1 import jobs_pb2 as pb


def encode(answer: Explanation) -> pb.ExplainJobResponse:
    message = pb.ExplainJobResponse(
        sentence=answer.sentence,
        suggestions=[
            pb.Suggestion(change=one.change, outcome=one.outcome) for one in answer.suggestions
        ],
    )
    start = answer.expected_start
    if start is not None:
        message.expected_start.time.FromMilliseconds(start.unix_ms)
        message.expected_start.nodes.extend(start.nodes)
        message.expected_start.where = start.where
        message.expected_start.after_job_id = start.after_job_id
    if answer.expected_end_unix_ms is not None:
        message.expected_end_time.FromMilliseconds(answer.expected_end_unix_ms)
    return message
