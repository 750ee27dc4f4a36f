"""`baton checkpoint`: lists, pins, and files that are verified on their way."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from blake3 import blake3

from protos.baton.v1 import checkpoints_pb2 as pb
from protos.baton.v1 import jobs_pb2, peer_pb2, types_pb2
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal

OTHER = "aa" * 32


def kept() -> list[pb.KeptCheckpoint]:
    """The head, one that is pinned, and one that is set aside."""
    head = pb.KeptCheckpoint(checkpoint=samples.active_job().checkpoint, used_by=["head", "12.2"])
    older = types_pb2.Checkpoint(
        digest=OTHER, step=50, size_bytes=1024, replicas=["n1"], commit_time=samples.ago(90_000)
    )
    bad = types_pb2.Checkpoint(digest="bb" * 32, step=75, size_bytes=1024)
    return [
        head,
        pb.KeptCheckpoint(checkpoint=bad, bad="set aside: 2 attempts from it failed at step 80"),
        pb.KeptCheckpoint(checkpoint=older, pinned=True),
    ]


def test_the_list_for_people_and_for_programs(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListCheckpoints"] = [pb.ListCheckpointsResponse(checkpoints=kept())]
    result = baton("checkpoint", "list", "12")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert lines == [
        ["DIGEST", "STEP", "AGE", "SIZE", "COPIES ON", "PINNED", "USED BY", "NOTE"],
        [samples.DIGEST[:12], "100", "42s", "1.21 GiB", "n2 n3", "-", "head 12.2", "-"],
        [
            *("bbbbbbbbbbbb", "75", "-", "1 KiB", "-", "-", "-"),
            "set aside: 2 attempts from it failed at step 80",
        ],
        ["aaaaaaaaaaaa", "50", "1d01h", "1 KiB", "n1", "yes", "-", "-"],
    ]
    documents = json.loads(baton("--json", "checkpoint", "list", "12").stdout)
    assert [document["digest"] for document in documents] == [samples.DIGEST, "bb" * 32, OTHER]
    assert [document["pinned"] for document in documents] == [False, False, True]
    assert documents[0]["used_by"] == ["head", "12.2"]
    assert documents[0]["replicas"] == ["n2", "n3"]


def test_no_checkpoint_is_said(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListCheckpoints"] = [pb.ListCheckpointsResponse()]
    said = baton("checkpoint", "list", "12")
    assert (said.stdout, said.stderr) == ("", "baton: job 12 has no checkpoint\n")
    result = baton("checkpoint", "list", "12", "--json")
    assert (result.stdout, result.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        ((), pb.CheckpointChoice()),
        (("50",), pb.CheckpointChoice(step=50)),
        (("0",), pb.CheckpointChoice(step=0)),
        (("aaaaaa",), pb.CheckpointChoice(digest="aaaaaa")),
        ((OTHER,), pb.CheckpointChoice(digest=OTHER)),
        (("1" * 64,), pb.CheckpointChoice(digest="1" * 64)),
    ],
)
def test_what_is_pinned_and_unpinned(
    words: tuple[str, ...], choice: pb.CheckpointChoice, baton: Baton, fake: FakeCoordinator
) -> None:
    fake.answers["PinCheckpoint"] = [pb.PinCheckpointResponse(checkpoints=kept())]
    fake.answers["UnpinCheckpoint"] = [pb.UnpinCheckpointResponse(checkpoints=kept())]
    assert "aaaaaaaaaaaa" in baton("checkpoint", "pin", "12", *words).stdout
    assert baton("checkpoint", "unpin", "12", *words).exit_code == 0
    pin, unpin = fake.requests
    assert pin == pb.PinCheckpointRequest(job_id=12, choice=choice)
    assert unpin.HasField("choice") == bool(words)
    assert unpin.choice == choice


def test_a_word_that_is_neither_is_wrong_usage(baton: Baton, fake: FakeCoordinator) -> None:
    result = baton("checkpoint", "pin", "12", "newest")
    assert result.exit_code == 2
    assert "'newest' is neither a step nor the beginning of a digest" in result.stderr
    assert not fake.requests


def test_a_refusal_is_the_coordinators_sentence(baton: Baton, fake: FakeCoordinator) -> None:
    sentence = "job 12 does not keep a checkpoint of step 7; it keeps those of steps 100, 50"
    fake.answers["PinCheckpoint"] = [Refusal(grpc.StatusCode.NOT_FOUND, sentence)]
    result = baton("checkpoint", "pin", "12", "7")
    assert (result.exit_code, result.stderr) == (1, f"baton: {sentence}\n")


# --- export -------------------------------------------------------------------------------------

CHUNKS = [b"one chunk", b"and another"]
DIGESTS = [blake3(data).hexdigest() for data in CHUNKS]
FILES = {"model.safetensors": [0, 1, 0], "deep/state.json": [1], "empty": []}


def manifest(**files: list[int]) -> bytes:
    document = {
        "step": 100,
        "files": [
            {"path": path, "chunks": [[DIGESTS[i], len(CHUNKS[i])] for i in parts]}
            for path, parts in (files or FILES).items()
        ],
    }
    return json.dumps(document).encode()


def pieces(data: bytes, digest: str = "", size: int = 4) -> list[pb.ReadCheckpointResponse]:
    """A chunk in pieces, as it comes."""
    name = digest or blake3(data).hexdigest()
    return [
        pb.ReadCheckpointResponse(
            chunk=peer_pb2.Chunk(digest=name, data=data[at : at + size], size_bytes=len(data))
        )
        for at in range(0, len(data), size)
    ]


def answer(document: bytes = b"", digest: str = "") -> list[pb.ReadCheckpointResponse]:
    document = document or manifest()
    named = peer_pb2.Manifest(digest=digest or blake3(document).hexdigest(), data=document)
    return [pb.ReadCheckpointResponse(manifest=named), *pieces(CHUNKS[0]), *pieces(CHUNKS[1])]


@pytest.fixture
def job(fake: FakeCoordinator) -> types_pb2.Job:
    found = samples.active_job()
    fake.answers["GetJob"] = [lambda request: jobs_pb2.GetJobResponse(job=found)]
    return found


def test_raw_is_the_files_as_they_were(
    baton: Baton, fake: FakeCoordinator, job: types_pb2.Job, tmp_path: Path
) -> None:
    fake.answers["ReadCheckpoint"] = [answer()]
    words = ("checkpoint", "export", "12", "--format", "raw", "--step", "100")
    result = baton(*words, "--to", str(tmp_path / "made"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"step 100 of job {job.id}" in result.stdout
    found = {
        str(path.relative_to(tmp_path / "made")): path.read_bytes()
        for path in (tmp_path / "made").rglob("*")
        if path.is_file()
    }
    assert found == {name: b"".join(CHUNKS[i] for i in parts) for name, parts in FILES.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert fake.requests[-1] == pb.ReadCheckpointRequest(
        job_id=12, choice=pb.CheckpointChoice(step=100)
    )


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda: answer(digest="ee" * 32), "the manifest of eeeeeeeeeeee does not match"),
        (lambda: answer()[1:], "came without its manifest"),
        (list, "came without its manifest"),
        (lambda: answer()[:-1], "ended with 1 chunks missing"),
        (lambda: [*answer()[:1], *pieces(b"odd chunk", DIGESTS[0])], "does not match its digest"),
        (lambda: [*answer()[:1], *pieces(b"a longer chunk", DIGESTS[0])], "does not match its"),
        (lambda: [*answer(), *pieces(b"not asked for")], "does not match its digest"),
        (lambda: answer(manifest(**{"../out": [0, 1]})), "outside of it: '../out'"),
        (lambda: answer(manifest(**{"/out": [0, 1]})), "outside of it: '/out'"),
        (
            lambda: [*answer()[:3], Refusal(grpc.StatusCode.UNAVAILABLE, "is not to be had: n1")],
            "is not to be had: n1",
        ),
    ],
)
def test_what_does_not_verify_is_not_exported(
    *,
    spoil: Callable[[], list[object]],
    sentence: str,
    baton: Baton,
    fake: FakeCoordinator,
    job: types_pb2.Job,
    tmp_path: Path,
) -> None:
    fake.answers["ReadCheckpoint"] = [spoil()]
    target = str(tmp_path / "inner" / "made")
    (tmp_path / "inner").mkdir()
    result = baton("checkpoint", "export", "12", "--format", "raw", "--to", target)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["inner"]


def test_the_conversion_runs_in_the_interpreter_that_is_named(
    baton: Baton, fake: FakeCoordinator, job: types_pb2.Job, tmp_path: Path
) -> None:
    job.spec.trainer_config_json = json.dumps({"model": "hub/model"})
    fake.answers["ReadCheckpoint"] = [answer()]
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "place = sys.argv[sys.argv.index('--to') + 1]\n"
        "import os; os.mkdir(place)\n"
        "open(place + '/said', 'w').write(json.dumps(sys.argv[1:]))\n"
    )
    python.chmod(0o700)
    words = ("checkpoint", "export", "12", "--format", "huggingface", "--python", str(python))
    result = baton(*words, "--to", str(tmp_path / "made"), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["directory"] == str(tmp_path / "made")
    said = json.loads((tmp_path / "made" / "said").read_text())
    assert said[:3] == ["-P", "-m", "trainers.export"]
    assert said[said.index("--model") + 1] == "hub/model"
    about = json.loads(said[said.index("--about") + 1])
    assert (about["job"], about["step"], about["name"]) == (12, 100, "finetune-7b")


def test_a_conversion_that_fails_says_its_last_line(
    baton: Baton, fake: FakeCoordinator, job: types_pb2.Job, tmp_path: Path
) -> None:
    fake.answers["ReadCheckpoint"] = [answer()]
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('a\\nhas no torch: install it')\n")
    python.chmod(0o700)
    words = ("checkpoint", "export", "12", "--format", "safetensors", "--python", str(python))
    result = baton(*words, "--to", str(tmp_path / "made"))
    assert result.exit_code == 1
    assert result.stderr == "baton: the conversion failed: has no torch: install it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_what_is_there_is_not_overwritten(baton: Baton, tmp_path: Path) -> None:
    for words in (("export", "12"), ("import", str(tmp_path))):
        result = baton(
            "checkpoint", *words, "--format", "safetensors", "--to", str(tmp_path)
        )  # fmt: skip
        assert result.exit_code == 2
        assert "exists already; name a new directory" in result.stderr


def test_a_job_without_a_model_needs_one(
    baton: Baton, fake: FakeCoordinator, job: types_pb2.Job, tmp_path: Path
) -> None:
    fake.answers["ReadCheckpoint"] = [answer()]
    words = ("checkpoint", "export", "12", "--format", "huggingface")
    result = baton(*words, "--to", str(tmp_path / "made"))
    assert (result.exit_code, "give --model FOLDER" in result.stderr) == (2, True)
    both = baton(*words, "--to", str(tmp_path / "made"), "--step", "1", "--digest", "aaaaaa")
    assert (both.exit_code, "contradict each other" in both.stderr) == (2, True)


@pytest.mark.parametrize("command", ["list", "pin", "unpin", "export", "import"])
def test_each_command_shows_an_example(command: str, baton: Baton) -> None:
    shown = baton("checkpoint", command, "--help").stdout
    assert f"\n  baton checkpoint {command}" in shown.replace("\n    ", "\n  ")
    assert "--json" in shown
