"""What one side encodes the other side decodes, to the last field; nonsense gets a sentence.

Problem: two translators, written apart, agree until somebody adds a field to one of them. So every
message is drawn at random from its dataclass on one side, sent through real bytes, and compared
field by field with what comes out on the other. And whatever bytes a stranger sends, the answer is
a value or `WireError`, since any other exception would be taken for a bug and end the program.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent import wire as agent_wire
from agent.core import health as ah
from agent.core import messages as am
from agent.core import trainer_messages as at
from agent.core import values as av
from coordinator import wire as coordinator_wire
from coordinator import wire_nodes
from coordinator.core import accounting, launch, model
from coordinator.core import messages as cm
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Instant
from protos.baton.v1 import agent_pb2 as pb
from protos.baton.v1 import types_pb2 as types

TEXT = st.text(max_size=12)
COUNT = st.integers(0, 2**63 - 1)
SMALL = st.integers(0, 2**31 - 1)
RATIO = st.floats(allow_nan=False)
UNIX_MS = st.integers(0, 253_402_300_799_999)
DURATION_MS = st.integers(0, 7 * 24 * 3_600_000)
POSITIVE_MS = st.integers(1, 3_600_000)
ATTEMPT = st.builds("{}.{}".format, st.integers(1, 10**9), st.integers(1, 10**9))
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
NODE = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,8}[a-z0-9])?", fullmatch=True).filter(
    lambda name: name != "shared"
)


def many(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(strategy, max_size=3).map(tuple)


def maybe(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | strategy


METRICS = st.dictionaries(TEXT, RATIO, max_size=3).map(lambda d: tuple(sorted(d.items())))
PIDS = many(st.integers(1, 2**22))
HELD = st.builds(
    am.HeldAttempt, ATTEMPT, many(TEXT), st.booleans(), maybe(PIDS), maybe(DURATION_MS), SMALL
)
SECONDS = st.floats(0, 1e9)
TRAINER_TIME = st.builds(at.TrainerTime, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
PROGRESS = st.builds(am.Progress, COUNT, COUNT, METRICS, maybe(TRAINER_TIME))
HOST_SAMPLE = st.builds(av.HostSample, RATIO, COUNT, COUNT, RATIO)
SPREAD = maybe(st.builds(av.Spread, RATIO, RATIO, RATIO))
GPU_SAMPLE = st.builds(
    av.GpuSample, TEXT, maybe(RATIO), maybe(COUNT), maybe(SMALL), maybe(COUNT), maybe(COUNT),
    maybe(SMALL), maybe(SMALL), TEXT, age_ms=DURATION_MS,
    window=maybe(st.builds(av.GpuWindow, SMALL, SPREAD, SPREAD, SPREAD, SPREAD)),
)  # fmt: skip
HEALTH = st.builds(
    ah.GpuVerdict, TEXT.filter(bool), st.sampled_from(ah.Verdict), TEXT, TEXT,
    many(st.builds(ah.XidRecord, SMALL, COUNT, UNIX_MS, UNIX_MS, TEXT)),
)  # fmt: skip
BODY = st.one_of(
    st.builds(
        am.AttemptStarted,
        SMALL,
        DIGEST,
        COUNT,
        many(st.tuples(DIGEST, TEXT)),
        maybe(DURATION_MS),
        maybe(DURATION_MS),
        many(SMALL),
    ),
    st.builds(am.AttemptExited, maybe(SMALL), maybe(SMALL), TEXT, st.booleans(), maybe(SMALL)),
    st.builds(am.AttemptRefused, TEXT, st.booleans()),
    st.builds(am.AttemptMilestone, TEXT),
    st.builds(am.CheckpointProposed, DIGEST, st.just("") | DIGEST, COUNT, COUNT, many(NODE)),
)
UPWARD = st.one_of(
    st.builds(
        am.Hello, NODE, TEXT.filter(bool), TEXT,
        st.builds(av.HostFacts, TEXT, TEXT, SMALL, COUNT, TEXT, TEXT, TEXT),
        many(st.builds(av.GpuFacts, TEXT, TEXT, COUNT)), many(HELD), many(DIGEST), COUNT,
        many(HEALTH),
    ),
    st.builds(
        am.Heartbeat, COUNT, maybe(HOST_SAMPLE), many(GPU_SAMPLE), many(HELD),
        many(st.tuples(ATTEMPT, PROGRESS)),
    ),
    st.builds(am.AgentEvent, st.integers(1, 2**63 - 1), UNIX_MS, ATTEMPT, BODY),
    st.builds(
        am.AgentEvent, st.integers(1, 2**63 - 1), UNIX_MS, st.just(""),
        st.builds(ah.GpuHealthChanged, many(HEALTH)),
    ),
    st.builds(am.Goodbye, maybe(DURATION_MS)),
)  # fmt: skip

ADDRESS = st.builds(launch.PeerAddress, TEXT, TEXT)
SPEC = st.builds(
    model.JobSpec,
    name=TEXT.filter(bool),
    project=TEXT.filter(bool),
    job_class=st.sampled_from(model.JobClass),
    command=many(TEXT),
    trainer=TEXT,
    trainer_config_json=TEXT,
    environment=st.dictionaries(TEXT, TEXT, max_size=3).map(lambda d: tuple(sorted(d.items()))),
    working_directory=TEXT,
    gpus=SMALL,
    gpu_types=many(TEXT),
    gpu_memory_bytes_min=COUNT,
    shared_gpu_memory_bytes=COUNT,
    share_automatic=st.booleans(),
    memory_bytes=COUNT,
    grace_ms=DURATION_MS,
    stop_signal=st.sampled_from(model.StopSignal),
    max_restarts=SMALL,
    run_again_exit_codes=many(SMALL).filter(bool),
    replication=st.sampled_from(model.Replication),
    slurm_environment=st.booleans(),
    hold=st.booleans(),
    keep_checkpoints=SMALL,
    ranks=st.integers(1, 2**31 - 1),
    deadline_unix_ms=st.integers(0, 253_402_300_799_999),
    array=TEXT,
)
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ORDER = st.one_of(
    st.builds(
        cm.Welcome, COUNT, POSITIVE_MS, POSITIVE_MS, COUNT,
        st.sampled_from(model.TelemetryRate), POSITIVE_MS,
    ),
    st.builds(cm.ComeLater, DURATION_MS),
    st.builds(cm.LeaseRenewal, COUNT),
    st.builds(cm.EventAck, COUNT),
    st.builds(
        cm.StartAttempt, ATTEMPT, SPEC, many(TEXT),
        many(st.builds(launch.RestoreCandidate, DIGEST, COUNT, many(ADDRESS))),
        maybe(ADDRESS), SMALL, traceparent=st.sampled_from(("", TRACEPARENT)),
    ),
    st.builds(cm.StopAttempt, ATTEMPT, maybe(DURATION_MS), TEXT, maybe(DURATION_MS)),
    st.builds(
        cm.SetReplicaTarget, ATTEMPT, maybe(ADDRESS), st.booleans(),
        maybe(st.builds(cm.LoneCheckpoint, DIGEST, COUNT, SMALL)), st.booleans(),
    ),
    st.builds(cm.CommitResult, ATTEMPT, DIGEST, st.booleans(), TEXT),
    st.builds(cm.KeepCheckpoints, many(DIGEST)),
)  # fmt: skip


# What an agent knows for itself.
STAYS = (
    "pci_bus_id",
    "place",
    "condition",
    "clock_event_reasons",
    "telemetry_age_ms",
    "usage",
    "inventory",
    "details",
)


FIGURES = (
    "utilization_ratio", "memory_used_bytes", "temperature_celsius", "power_mw", "energy_mj",
    "sm_clock_mhz", "memory_clock_mhz",
)  # fmt: skip


def arrived(reading: model.GpuReading) -> av.GpuSample:
    """A reading as its agent had it, out of the few fields of the core and what is kept as it
    came."""
    said = types.GpuTelemetry.FromString(reading.figures)

    def optional(of: Any, name: str) -> Any:
        return getattr(of, name) if of.HasField(name) else None

    window = None
    if said.HasField("window"):
        spreads = [optional(said.window, name) for name in FIGURES[:4]]
        known = [one and av.Spread(one.min, one.mean, one.max) for one in spreads]
        window = av.GpuWindow(said.window.readings, *known)
        assert reading.used_ratio == (known[0] and known[0].mean)
    assert (said.uuid, said.error) == (reading.uuid, reading.error)
    assert reading.read_between == (window is not None)
    figures = {name: optional(said, name) for name in FIGURES}
    return av.GpuSample(
        reading.uuid, **figures, error=reading.error, age_ms=reading.age_ms, window=window
    )


def plain(value: object) -> object:
    """A value without its classes: the two sides have one each for every message. Names may differ
    from one side to the other, order and meaning may not."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [plain(getattr(value, name)) for name in names if name not in STAYS]
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


@settings(max_examples=60)
@given(UPWARD)
def test_all_that_an_agent_says_arrives(message: am.Upward) -> None:
    sent = pb.SessionRequest.FromString(agent_wire.encode(message).SerializeToString())
    heard = coordinator_wire.decode(sent)
    assert type(heard).__name__ == type(message).__name__
    said: Any = plain(message)
    if isinstance(message, am.Hello):
        # That it knows gangs and shares, which is said of this version, not of a value.
        said = [*said, True, True]
    if isinstance(heard, cm.Heartbeat):
        gpus = tuple(map(arrived, heard.gpus))
        heard = dataclasses.replace(heard, gpus=())
        assert isinstance(message, am.Heartbeat)
        assert plain(gpus) == plain(message.gpus)
        said = plain(dataclasses.replace(message, gpus=()))
    assert plain(heard) == said


def test_a_reading_is_as_old_as_it_is_when_it_is_sent() -> None:
    """Repeated by order for 4 s before the report was made, which then waited for 300 ms."""
    beat = am.Heartbeat(1, None, (av.GpuSample("GPU-1", age_ms=4_000),), (), (), 300)
    heard = coordinator_wire.decode(agent_wire.encode(beat))
    assert isinstance(heard, cm.Heartbeat)
    assert heard.gpus[0].age_ms == 4_300


def test_what_older_programs_do_not_say_has_a_meaning() -> None:
    beat = pb.SessionRequest(
        heartbeat=pb.Heartbeat(sequence=1, gpus=[types.GpuTelemetry(uuid="GPU-1")])
    )
    heard = coordinator_wire.decode(beat)
    assert isinstance(heard, cm.Heartbeat)
    assert (heard.gpus[0].age_ms, heard.gpus[0].read_between) == (0, False)
    welcome = coordinator_wire.encode(cm.Welcome(1, 1_000, 8_000, 0))
    welcome.welcome.ClearField("report_interval")
    told = agent_wire.decode(welcome)
    assert isinstance(told, am.Welcome)
    assert told.report_interval_ms == 0, "with every heartbeat"


@settings(max_examples=60)
@given(ORDER)
def test_all_that_an_agent_is_told_arrives(order: cm.AgentOrder) -> None:
    sent = pb.SessionResponse.FromString(coordinator_wire.encode(order).SerializeToString())
    heard = agent_wire.decode(sent)
    assert type(heard).__name__ == type(order).__name__
    if isinstance(order, cm.StartAttempt):
        assert isinstance(heard, am.StartAttempt)
        check_spec(order.spec, heard.spec)
        order, heard = without_spec(order), without_spec(heard)  # type: ignore[assignment]
    assert plain(heard) == plain(order)


def without_spec(order: cm.StartAttempt | am.StartAttempt) -> tuple[object, ...]:
    names = [field.name for field in dataclasses.fields(order)]
    return tuple(getattr(order, name) for name in names if name != "spec")


def check_spec(said: model.JobSpec, heard: am.JobSpec) -> None:
    """A node needs a part of it, and that part is the same; it keeps all of it."""
    whole = types.JobSpec.FromString(heard.whole)
    assert coordinator_wire.decode_spec(whole) == said
    for field in dataclasses.fields(am.JobSpec):
        if field.name == "whole":
            continue
        expected = getattr(said, field.name)
        value = expected.value if isinstance(expected, model.Replication) else expected
        value = value.value if isinstance(value, model.StopSignal) else value
        assert getattr(heard, field.name) == value, field.name


@given(SPEC)
def test_a_specification_survives_its_submission(spec: model.JobSpec) -> None:
    sent = types.JobSpec.FromString(coordinator_wire.encode_spec(spec).SerializeToString())
    assert coordinator_wire.decode_spec(sent) == spec


ACCOUNT_FIELDS = types.Accounting.DESCRIPTOR.fields
ACCOUNT = st.builds(
    model.Accounting,
    **dict.fromkeys(("wall_s", *accounting.PARTS), SECONDS),
    overstated_ratio=st.floats(1, 1e9),
    measured=st.booleans(),
)
VIEW = st.builds(
    model.JobView,
    st.just(model.Job(1, model.JobSpec(), JobPhase.ACTIVE, 0, epoch=1)),
    st.just((model.Attempt(1, 1, "n1", (), AttemptPhase.RUNNING, 0),)),
    accounts=ACCOUNT.map(lambda account: (account,)) | st.just(()),
    accounting=maybe(ACCOUNT),
)


@settings(max_examples=60)
@given(VIEW)
def test_an_account_is_shown_as_it_is(view: model.JobView) -> None:
    heard = types.Job.FromString(coordinator_wire.encode_job(view).SerializeToString())
    attempt_account = view.accounts[0] if view.accounts else None
    for message, account in ((heard, view.accounting), (heard.attempts[0], attempt_account)):
        assert message.HasField("accounting") == (account is not None)
        if account is not None:
            shown = [getattr(message.accounting, field.name) for field in ACCOUNT_FIELDS]
            assert shown == list(dataclasses.astuple(account))


# --- nonsense -----------------------------------------------------------------------------------


def filled(message: type[Message], depth: int = 4) -> st.SearchStrategy[Message]:
    """Any message of a type that protobuf itself lets through, valid or not."""

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        built = message()
        for field in message.DESCRIPTOR.fields:
            if depth == 0 or not draw(st.booleans()):
                continue
            fill(draw, built, field, depth)
        return built

    return build()


def fill(draw: st.DrawFn, built: Message, field: object, depth: int) -> None:
    name, kind = field.name, field.cpp_type  # type: ignore[attr-defined]
    nested = field.message_type  # type: ignore[attr-defined]
    repeated = field.is_repeated  # type: ignore[attr-defined]
    if nested is not None and nested.GetOptions().map_entry:
        is_text = nested.fields_by_name["value"].cpp_type == 9
        entries = st.dictionaries(TEXT, TEXT if is_text else RATIO, max_size=2)
        getattr(built, name).update(draw(entries))
    elif nested is not None:
        inner = draw(filled(nested._concrete_class, depth - 1))
        if repeated:
            getattr(built, name).append(inner)
        else:
            getattr(built, name).CopyFrom(inner)
    else:
        value = draw(SCALARS[kind])
        if repeated:
            getattr(built, name).append(value)
        else:
            setattr(built, name, value)


SCALARS: dict[int, st.SearchStrategy[object]] = {
    1: st.integers(-(2**31), 2**31 - 1),
    2: st.integers(-(2**63), 2**63 - 1),
    5: st.floats(),
    7: st.booleans(),
    8: st.integers(-(2**31), 2**31 - 1),  # an enum of proto3 takes any number
    9: st.one_of(TEXT, ATTEMPT, DIGEST, NODE, st.just("9" * 5_000 + ".1")),
}


@settings(max_examples=80)
@given(filled(pb.SessionRequest))
def test_the_coordinator_survives_any_message(message: pb.SessionRequest) -> None:
    try:
        heard = coordinator_wire.decode(message)
    except coordinator_wire.WireError:
        return
    if isinstance(heard, cm.AgentEvent):
        # What was let in can be said again: a reply that cannot be encoded would end the program.
        now = Instant(0, heard.unix_ms)
        event = model.JobEvent(1, 1, now.unix_ms, "attempt.milestone")
        coordinator_wire.encode_event(event)


@settings(max_examples=80)
@given(filled(pb.SessionResponse))
def test_the_agent_survives_any_message(message: pb.SessionResponse) -> None:
    try:
        heard = agent_wire.decode(message)
    except agent_wire.WireError:
        return
    if isinstance(heard, am.Welcome):
        assert heard.lease_ms > 0, "a lease of nothing would end before it begins, for ever"
        assert heard.heartbeat_interval_ms > 0
    if isinstance(heard, am.StopAttempt):
        assert heard.grace_ms is None or heard.grace_ms >= 0
        assert heard.precopy_ms is None or heard.precopy_ms >= 0


@settings(max_examples=60)
@given(filled(types.JobSpec))
def test_any_submission_is_a_specification_or_refused(message: types.JobSpec) -> None:
    try:
        spec = coordinator_wire.decode_spec(message)
    except coordinator_wire.WireError:
        return
    coordinator_wire.encode_spec(spec)


@given(st.binary(max_size=64))
@example(b"\x0a\x03\x0a\x01\xff")  # a hello whose node is not UTF-8: refused before it is a value
def test_any_bytes(data: bytes) -> None:
    for message, decode, wrong in SIDES:
        with contextlib.suppress(DecodeError, wrong):
            decode(message.FromString(data))


SIDES: tuple[tuple[type[Message], Callable[..., object], type[Exception]], ...] = (
    (pb.SessionRequest, coordinator_wire.decode, coordinator_wire.WireError),
    (pb.SessionResponse, agent_wire.decode, agent_wire.WireError),
)


def hello(**fields: object) -> pb.SessionRequest:
    said = {"node": "n1", "journal_id": "j1", **fields}
    return pb.SessionRequest(hello=pb.Hello(**said))  # type: ignore[arg-type]


def told_time(**seconds: float) -> pb.SessionRequest:
    progress = types.Progress(step=1, time=types.TrainerTime(**seconds))
    told = pb.AttemptProgress(attempt="1.1", progress=progress)
    return pb.SessionRequest(heartbeat=pb.Heartbeat(sequence=1, progress=[told]))


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (pb.SessionRequest(), "kind that this coordinator does not know"),
        (hello(node="N1"), "is no node name"),
        (hello(node="shared"), "is no node name"),
        (hello(node="n1\n"), "is no node name"),
        (hello(node="n" * 65), "is no node name"),
        (hello(journal_id=""), "no journal id"),
        (hello(attempts=[pb.HeldAttempt(attempt="1")]), "is no attempt id"),
        (hello(checkpoints=["abc"]), "is no digest"),
        (
            pb.SessionRequest(event=pb.AgentEvent(sequence=1, attempt="1.1")),
            "an event of a kind",
        ),
        (
            pb.SessionRequest(
                event=pb.AgentEvent(
                    sequence=1, attempt="1.1",
                    checkpoint_proposed=pb.CheckpointProposed(digest="A" * 64),
                )
            ),
            "is no digest",
        ),
        (told_time(step_seconds=-1), "step_s is -1.0; it must be between 0 and"),
        (told_time(capture_seconds=float("nan")), "capture_s is nan"),
        (told_time(restore_seconds=float("inf")), "restore_s is inf"),
    ],
)  # fmt: skip
def test_the_coordinator_says_what_is_wrong(message: pb.SessionRequest, sentence: str) -> None:
    with pytest.raises(coordinator_wire.WireError, match=sentence):
        coordinator_wire.decode(message)


@pytest.mark.parametrize("attempt", ["", "1", "1.", ".1", "0.1", "1.0", "1.1\n", "1" * 19 + ".1"])
def test_what_is_no_attempt_id(attempt: str) -> None:
    with pytest.raises(agent_wire.WireError, match="is no attempt id"):
        agent_wire.decode(pb.SessionResponse(stop_attempt=pb.StopAttempt(attempt=attempt)))


def test_a_reading_without_end_is_refused() -> None:
    """It is kept as it came."""
    said = types.GpuTelemetry(uuid="g", error="x" * wire_nodes.FIGURES_BYTES_MAX)
    beat = pb.SessionRequest(heartbeat=pb.Heartbeat(sequence=1, gpus=[said]))
    with pytest.raises(coordinator_wire.WireError, match="is the limit"):
        coordinator_wire.decode(beat)


def test_of_a_heartbeat_no_more_is_kept_than_was_said_of_its_gpus() -> None:
    gpu = types.GpuTelemetry(uuid="g", power_mw=300_000)
    beat = pb.SessionRequest(heartbeat=pb.Heartbeat(sequence=1, gpus=[gpu]))
    for number in range(500):
        progress = beat.heartbeat.progress.add(attempt=f"{number + 1}.1").progress
        progress.metrics[f"metric-{number}"] = 1.0
    heard = coordinator_wire.decode(beat)
    assert isinstance(heard, cm.Heartbeat)
    assert heard.gpus[0].figures == gpu.SerializeToString()


def test_an_absurd_age_is_an_old_one() -> None:
    """It grows until the next report, and whoever lists nodes has to be able to say it."""
    said = types.GpuTelemetry(uuid="g")
    said.age.seconds = 2**63 - 1
    assert wire_nodes.decode_reading(said).age_ms == wire_nodes.AGE_MS_MAX
