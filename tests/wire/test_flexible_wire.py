"""How long a job may wait, on the wire: unsaid where it may not."""

from coordinator import wire
from coordinator.core.model import JobSpec


def test_it_arrives() -> None:
    spec = JobSpec("a", command=("true",), gpus=1, flexible_ms=86_400_000)
    sent = wire.encode_spec(spec)
    assert sent.flexible.seconds == 86_400
    assert wire.decode_spec(sent) == spec


def test_one_that_may_not_wait_says_nothing() -> None:
    sent = wire.encode_spec(JobSpec(command=("true",)))
    assert not sent.HasField("flexible"), "an older reader gets what it always got"
    assert wire.decode_spec(sent).flexible_ms == 0
