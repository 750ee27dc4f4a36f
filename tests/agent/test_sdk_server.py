"""The trainer socket, spoken to by well-behaved, broken and hostile trainers over a real socket."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
import structlog

from agent import sdk_connection, sdk_server
from agent.core.trainer_messages import (
    TrainerCheckpoint,
    TrainerHeedsSaves,
    TrainerLeaving,
    TrainerMilestone,
    TrainerProgress,
    TrainerSection,
    TrainerTime,
)
from agent.sdk_server import SdkServer
from tests.agent.sdk_house import DEADLINE_S, HELLO, WELCOME, House


async def test_the_conversation(house: House) -> None:
    (house.staging / "ckpt-120").mkdir()
    trainer = await house.greeted()
    path = str(house.staging / "ckpt-120")
    real = house.staging.resolve() / "ckpt-120"
    trainer.send({"type": "progress", "step": 1})
    trainer.send(
        {"type": "progress", "step": 2, "total_steps": 9, "metrics": {"loss": 1, "a": 0.5}}
    )
    trainer.send({"type": "milestone", "name": "imports", "unix_ms": 1790000000000})
    trainer.send({"type": "checkpoint", "id": 7, "path": path, "step": 120})
    trainer.send({"type": "checkpoint", "id": 8, "path": path, "step": 130, "parts": 1024})
    assert [await house.message() for _ in range(5)] == [
        ("1.1", TrainerProgress(1, None, ())),
        ("1.1", TrainerProgress(2, 9, (("loss", 1.0), ("a", 0.5)))),
        ("1.1", TrainerMilestone("imports", 1790000000000)),
        ("1.1", TrainerCheckpoint(7, str(real), 120)),
        ("1.1", TrainerCheckpoint(8, str(real), 130, 1024)),
    ]
    house.server.tell("1.1", {"type": "stored", "id": 7, "digest": "ab"})
    assert await trainer.receive() == {"type": "stored", "id": 7, "digest": "ab"}


async def test_tell_goes_to_the_newest_connection_and_waits_for_one(house: House) -> None:
    kept = sdk_connection.QUEUED_MESSAGES_MAX
    for number in range(kept + 3):
        house.server.tell("1.1", {"type": "stored", "id": number})
    first = await house.greeted()
    for number in range(3, kept + 3):  # the newest were kept, in order
        assert await first.receive() == {"type": "stored", "id": number}
    second = await house.greeted()
    house.server.tell("1.1", {"type": "save", "reason": "drain"})
    assert await second.receive() == {"type": "save", "reason": "drain"}
    house.server.tell("9.9", {"type": "stop"})  # nobody to tell
    house.server.unregister("1.1")
    assert await first.receive() is None
    assert await second.receive() is None
    late = await house.connect()
    late.send({"type": "hello", "version": 1, "token": "secret", "pid": 1})
    assert await late.refusal() == "unknown token"


async def test_each_rank_hears_of_its_own_checkpoint_and_all_of_a_stop(house: House) -> None:
    """A launcher's ranks may each have a connection, and each counts from 1."""
    trainers, numbers = [], []
    for pid in (41, 42):
        trainers.append(await house.greeted(pid=pid))
    for name, trainer in zip("ab", trainers, strict=True):
        (house.staging / name).mkdir()
        path = str(house.staging / name)
        trainer.send({"type": "checkpoint", "id": 1, "path": path, "step": 1})
        offered = (await house.message())[1]
        assert isinstance(offered, TrainerCheckpoint)
        numbers.append(offered.id)
    for number, digest in zip(numbers, ("ab", "cd"), strict=True):
        house.server.tell("1.1", {"type": "stored", "id": number, "digest": digest})
    house.server.tell("1.1", {"type": "stop", "reason": "drain", "grace_ms": 1})
    for trainer, digest in zip(trainers, ("ab", "cd"), strict=True):
        assert await trainer.receive() == {"type": "stored", "id": 1, "digest": digest}
        assert (await trainer.receive() or {})["type"] == "stop"


async def test_all_hear_that_they_hang_and_nobody_who_comes_later(house: House) -> None:
    trainers = [await house.greeted(pid=pid) for pid in (41, 42)]
    house.server.tell("1.1", {"type": "hung", "reason": "hung in step"})
    for trainer in trainers:
        assert await trainer.receive() == {"type": "hung", "reason": "hung in step"}
        trainer.writer.write_eof()
        assert await trainer.receive() is None
    house.server.tell("1.1", {"type": "hung", "reason": "hung in step"})
    again = await house.greeted(pid=43)
    house.server.tell("1.1", {"type": "save", "reason": "drain"})
    assert await again.receive() == {"type": "save", "reason": "drain"}


async def test_the_answer_to_a_rank_that_has_gone_waits_for_it(house: House) -> None:
    (house.staging / "a").mkdir()
    path = str(house.staging / "a")
    other, trainer = await house.greeted(pid=41), await house.greeted(pid=42)
    trainer.send({"type": "checkpoint", "id": 3, "path": path, "step": 1})
    offered = (await house.message())[1]
    assert isinstance(offered, TrainerCheckpoint)
    trainer.writer.write_eof()
    assert await trainer.receive() is None  # the server has seen it
    house.server.tell("1.1", {"type": "stored", "id": offered.id, "digest": "ab"})
    again = await house.greeted(pid=42)
    assert await again.receive() == {"type": "stored", "id": 3, "digest": "ab"}
    house.server.unregister("1.1")
    assert await other.receive() is None, "it heard of nobody else's"


async def test_what_was_told_just_before_the_end_still_arrives(house: House) -> None:
    trainer = await house.greeted()
    house.server.tell("1.1", {"type": "committed", "id": 1, "digest": "ab"})
    house.server.unregister("1.1")
    assert await trainer.receive() == {"type": "committed", "id": 1, "digest": "ab"}
    assert await trainer.receive() is None


async def test_an_attempt_speaks_only_for_itself(house: House, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "c").mkdir(parents=True)
    house.server.register("2.1", "another", str(other))
    trainer = await house.greeted("another")
    trainer.send({"type": "checkpoint", "id": 1, "path": str(other / "c"), "step": 1})
    assert (await house.message())[0] == "2.1"
    with pytest.raises(ValueError, match="belongs to another"):
        house.server.register("3.1", "another", str(other))
    with pytest.raises(ValueError, match="empty token"):
        house.server.register("3.1", "", str(other))
    house.server.register("2.1", "another", str(other))  # once more: nothing changes
    trainer.send({"type": "progress", "step": 2})
    assert await house.message() == ("2.1", TrainerProgress(2, None, ()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({**HELLO, "token": "wrong"}, "unknown token"),
        ({**HELLO, "token": None}, "unknown token"),
        ({**HELLO, "token": "\ud800"}, "unknown token"),
        ({**HELLO, "version": 2}, "this agent speaks version 1"),
        ({**HELLO, "pid": True}, "pid must be an integer from 0 to 9223372036854775807"),
        ({"type": "progress", "step": 1}, "the first line must be a hello"),
        (b"\xff\xfe\n", "not a JSON object in UTF-8"),
        (b"[]\n", "not a JSON object"),
        (b"[" * 60_000 + b"\n", "not a JSON object in UTF-8"),
    ],
)
async def test_a_bad_hello_is_refused(house: House, line: object, reason: str) -> None:
    trainer = await house.connect()
    trainer.send(line)
    assert await trainer.refusal() == reason
    assert house.messages == []


async def test_a_program_that_repeats_a_mistake_fills_no_journal(house: House) -> None:
    """It is told each time. Others are logged as before: each attempt, and after the next one has
    come also whoever does not say who it is."""

    async def mistaken(token: str) -> None:
        trainer = await house.connect()
        trainer.send({**HELLO, "token": token})
        if token != "wrong":
            assert await trainer.receive() == WELCOME
            trainer.send({"type": "progress", "step": -1})
        assert await trainer.refusal()

    with structlog.testing.capture_logs() as logged:
        for token in ["wrong"] * 20 + ["secret"] * 20:
            await mistaken(token)
        house.server.register("2.1", "theirs", str(house.staging))
        for token in ("theirs", "wrong"):
            await mistaken(token)
    refused = [line["attempt"] for line in logged if line["event"] == "trainer.line_refused"]
    assert refused == [""] * 16 + ["1.1"] * 16 + ["2.1", ""]


INTEGER = "must be an integer from 0 to 9223372036854775807"
SECONDS = "a time must be a number of seconds from 0 to 1000000000"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{}\n", "unknown type 'None'"),
        (HELLO, "a second hello on one connection"),
        ({"type": ["progress"]}, "unknown type \"['progress']\""),
        (b'{"type": "progress"\n', "not a JSON object in UTF-8"),
        (b'"' + b"x" * 70_000, "a line of more than 65536 bytes"),
        (b'{"x": "' + b"x" * 65_600 + b'"}\n', "a line of more than 65536 bytes"),
        (b'{"type":"progress","step":' + b"9" * 5000 + b"}\n", "not a JSON object in UTF-8"),
        ({"type": "progress"}, f"step {INTEGER}"),
        ({"type": "progress", "step": -1}, f"step {INTEGER}"),
        ({"type": "progress", "step": 1.5}, f"step {INTEGER}"),
        ({"type": "progress", "step": 1, "time": []}, "time must be an object of at most 64 names"),
        (
            {"type": "progress", "step": 1, "time": dict.fromkeys(map(str, range(65)), 1)},
            "time must be an object of at most 64 names",
        ),
        ({"type": "progress", "step": 1, "time": {"step_s": -1}}, SECONDS),
        ({"type": "progress", "step": 1, "time": {"step_s": "1"}}, SECONDS),
        ({"type": "progress", "step": 1, "time": {"step_s": True}}, SECONDS),
        ({"type": "progress", "step": 1, "time": {"capture_s": 10**9 + 1}}, SECONDS),
        (b'{"type":"progress","step":1,"time":{"step_s":NaN}}\n', SECONDS),
        (b'{"type":"progress","step":1,"time":{"restore_s":Infinity}}\n', SECONDS),
        ({"type": "progress", "step": 2**63}, f"step {INTEGER}"),
        ({"type": "progress", "step": 1, "total_steps": ""}, f"total_steps {INTEGER}"),
        (
            {"type": "progress", "step": 1, "metrics": {str(i): i for i in range(65)}},
            "metrics must be an object of at most 64 names",
        ),
        (
            {"type": "progress", "step": 1, "metrics": [1]},
            "metrics must be an object of at most 64 names",
        ),
        ({"type": "progress", "step": 1, "metrics": {"a": "1"}}, "a metric must be a number"),
        (
            {"type": "progress", "step": 1, "metrics": {"": 1}},
            "a name must be text of 1 to 128 characters",
        ),
        ({"type": "progress", "step": 1, "metrics": {"a\nb": 1}}, "a name must be printable"),
        (
            {"type": "milestone", "name": "x" * 129, "unix_ms": 1},
            "a name must be text of 1 to 128 characters",
        ),
        ({"type": "milestone", "name": "load", "unix_ms": None}, f"unix_ms {INTEGER}"),
    ],
)
async def test_a_bad_line_is_refused_and_reaches_nobody(
    house: House, line: object, reason: str
) -> None:
    trainer = await house.greeted()
    trainer.send(line)
    assert await trainer.refusal() == reason
    assert house.messages == []
    await house.greeted()  # the next one is served as before


@pytest.mark.parametrize("parts", [0, 1_025, True, "2", None])
async def test_a_number_of_parts_that_cannot_be(house: House, parts: object) -> None:
    path = house.staging / "ckpt"
    path.mkdir()
    trainer = await house.greeted()
    trainer.send({"type": "checkpoint", "id": 1, "path": str(path), "step": 1, "parts": parts})
    assert str(await trainer.refusal()).startswith("parts must be an integer from ")
    assert house.messages == []


async def test_times_of_a_newer_trainer_are_passed_over(house: House) -> None:
    trainer = await house.greeted()
    seconds = {"step_s": 3, "input_wait_s": 0.25, "dreaming_s": "long"}
    trainer.send({"type": "progress", "step": 1, "time": seconds})
    time = TrainerTime(step_s=3.0, input_wait_s=0.25)
    assert await house.message() == ("1.1", TrainerProgress(1, None, (), time))
    trainer.send({"type": "progress", "step": 1, "time": {}})
    assert await house.message() == ("1.1", TrainerProgress(1, None, (), TrainerTime()))


async def test_only_directories_inside_the_staging_directory(house: House, tmp_path: Path) -> None:
    staging = house.staging
    outside, beside = tmp_path / "outside", tmp_path / "staging-2"
    for directory in (outside, beside, staging / "real"):
        directory.mkdir()
    (staging / "link").symlink_to(outside)
    (staging / "loop").symlink_to(staging / "loop")
    (staging / "inner").symlink_to(staging / "real")
    (staging / "file").write_text("")
    inside = "path is not a directory inside the attempt's staging directory"
    for path, reason in [
        (str(outside), inside),
        (str(beside), inside),
        (str(staging), inside),
        (str(staging / ".." / "outside"), inside),
        (str(staging / "link"), inside),
        (str(staging / "file"), inside),
        (str(staging / "loop"), inside),
        (str(staging / "missing" / ".." / ".." / "outside"), inside),
        (str(staging) + "/\ud800", "path is no file name"),
        ("real", "path must be an absolute path"),
        (str(staging / "real") + "\0", "path must be an absolute path"),
        (7, "path must be an absolute path"),
    ]:
        trainer = await house.greeted()
        trainer.send({"type": "checkpoint", "id": 1, "path": path, "step": 1})
        assert await trainer.refusal() == reason, path
        assert house.messages == []
    trainer = await house.greeted()
    trainer.send({"type": "checkpoint", "id": 1, "path": str(staging / "inner"), "step": 1})
    real = str(staging.resolve() / "real")
    assert await house.message() == ("1.1", TrainerCheckpoint(1, real, 1))
    # what has been stored and cleared away may be offered again; the core knows the answer
    trainer.send({"type": "checkpoint", "id": 2, "path": str(staging / "gone"), "step": 2})
    gone = str(staging.resolve() / "gone")
    assert await house.message() == ("1.1", TrainerCheckpoint(2, gone, 2))


async def test_odd_numbers_are_facts(house: House) -> None:
    trainer = await house.greeted()
    trainer.send(
        b'{"type":"progress","step":1,"metrics":{"a":Infinity,"b":1' + b"0" * 400 + b"}}\n"
    )
    infinite = float("inf")
    metrics = (("a", infinite), ("b", infinite))
    assert await house.message() == ("1.1", TrainerProgress(1, None, metrics))
    trainer.send(b'{"type":"progress","step":0,"total_steps":0,"metrics":null}')
    trainer.writer.write_eof()  # an unfinished line is no line
    assert await trainer.receive() is None
    assert house.messages == []


async def test_connections_of_one_attempt_are_limited(house: House) -> None:
    trainers = [await house.greeted() for _ in range(sdk_server.CONNECTIONS_PER_ATTEMPT_MAX)]
    over = await house.connect()
    over.send(HELLO)
    assert await over.refusal() == "more than 16 connections of one attempt"
    trainers[0].writer.write_eof()
    assert await trainers[0].receive() is None
    await house.greeted()


async def test_silent_connections_are_limited(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk_server, "HELLO_TIMEOUT_S", DEADLINE_S)  # none before the last has come
    silent = [await house.connect() for _ in range(sdk_server.CONNECTIONS_UNKNOWN_MAX)]
    over = await house.connect()
    assert await over.refusal() == "too many connections that have not said hello"
    for trainer in silent:
        trainer.writer.write_eof()
        assert await trainer.receive() is None
    monkeypatch.setattr(sdk_server, "HELLO_TIMEOUT_S", 0.0)
    late = await house.connect()
    assert await late.refusal() == "no hello within 0 s"


async def test_a_trainer_that_does_not_read_is_cut_off(house: House) -> None:
    deaf = await house.greeted()
    deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
    large = {"type": "refused", "reason": "x" * 60_000}
    for _ in range(100):
        house.server.tell("1.1", large)
    deaf.reader._transport.resume_reading()  # type: ignore[attr-defined]
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await deaf.reader.readexactly(100 * 60_000)
    again = await house.greeted()
    assert await again.receive() == large  # what had not been sent was kept


async def test_socket_file(tmp_path: Path, house: House) -> None:
    path = house.server.socket_path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    with pytest.raises(OSError, match="another agent listens"):
        await SdkServer(tmp_path / "run", house.note).open()
    await house.greeted()  # which has done no harm
    await house.server.close()
    assert list((tmp_path / "run").iterdir()) == []
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)  # what an agent that was killed leaves behind
    await house.server.open()
    await house.greeted()
    with pytest.raises(OSError, match="too long for a socket"):
        await SdkServer(tmp_path / ("x" * 100), house.note).open()


async def test_who_looks_for_requests_to_save_says_so_and_is_sent_one(house: House) -> None:
    trainer = await house.greeted()
    trainer.send({"type": "heeds_saves"})
    assert await house.message() == ("1.1", TrainerHeedsSaves())
    house.server.tell("1.1", {"type": "save", "reason": "n1 is being drained"})
    assert await trainer.receive() == {"type": "save", "reason": "n1 is being drained"}


async def test_a_last_word_is_a_status_and_a_sentence(house: House) -> None:
    trainer = await house.greeted()
    trainer.send({"type": "leaving", "status": 75, "reason": "the disk is full"})
    assert await house.message() == ("1.1", TrainerLeaving(75, "the disk is full"))
    trainer.send({"type": "leaving", "status": 0})
    assert await house.message() == ("1.1", TrainerLeaving(0))
    for wrong in ({"status": 256}, {"reason": ""}, {"status": 1, "reason": "two\nlines"}):
        refused = await house.greeted()
        refused.send({"type": "leaving", **wrong})
        assert await refused.refusal()


async def test_sections_are_of_one_connection_and_end_with_it(house: House) -> None:
    first, second = await house.greeted(), await house.greeted()
    said = {"type": "section", "name": "step", "count": 3, "unix_ms": 1790000000000}
    first.send(said)
    _, one = await house.message()
    second.send({**said, "name": "", "count": 0})
    _, other = await house.message()
    assert isinstance(one, TrainerSection)
    assert isinstance(other, TrainerSection)
    assert (one.name, one.count, other.name, other.count) == ("step", 3, "", 0)
    assert one.source != other.source
    first.writer.close()
    assert await house.message() == ("1.1", TrainerSection(one.source, ended=True))
    third = await house.greeted()
    third.writer.close()  # it said nothing of sections, and ends without a word
    second.send({**said, "name": "eval", "count": 1})
    assert await house.message() == ("1.1", TrainerSection(other.source, "eval", 1))
    second.send({**said, "name": "x" * 1000})
    assert "name" in str(await second.refusal())
