"""What a real job has learned leaves the fleet in each format, and a new job begins with it.

One fine-tuning job runs to its end. Its last checkpoint is exported by the command line, in every
format, opened by the libraries that the formats are for, and imported again; a second job that
starts from that measures at its first step what the first one measured at its last.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.e2e.trainers.counting import chain

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-export")]

STEPS = 20
CONFIG: dict[str, Any] = {
    "model": "language",
    "train_data": "text.txt",
    "tokenizer": "bytes",
    "window_tokens": 32,
    "batch_size": 4,
    "steps": STEPS,
    "evaluate_every": STEPS,
    "checkpoint_every_steps": 8,
    "checkpoint_every_s": 0,
    "learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, so that each checkpoint has a second holder."""
    with Cluster(tmp_path_factory.mktemp("export") / "cluster") as made:
        made.start_coordinator()
        for name in ("n1", "n2"):
            made.start_agent(name)
        made.wait_for_nodes("n1", "n2")
        yield made


@pytest.fixture(scope="module")
def finished(fleet: Cluster, models: Path) -> int:
    """The id of the job that has ended."""
    job_id = submit(fleet, models)
    work.wait_succeeded(fleet, job_id)
    return job_id


def submit(fleet: Cluster, models: Path, **more: object) -> int:
    config = json.dumps({**CONFIG, **more})
    return work.submit(
        fleet, (), trainer="finetune", trainer_config_json=config, working_directory=str(models)
    )


def export(fleet: Cluster, job_id: int, kind: str, target: Path, *words: str) -> dict[str, Any]:
    to = ("--to", str(target))
    document = fleet.baton_json("checkpoint", "export", str(job_id), "--format", kind, *to, *words)
    assert isinstance(document, dict)
    return document


def raw_weights(fleet: Cluster, job_id: int, place: Path) -> dict[str, Any]:
    """What the checkpoint's own files hold, by the library that others use."""
    from safetensors.torch import load_file

    export(fleet, job_id, "raw", place / "raw")
    names = ("frozen.safetensors", "model.safetensors")
    found = [load_file(place / "raw" / name) for name in names]
    return {k: v for k, v in (found[0] | found[1]).items() if not k.startswith("extra/")}


def read_safetensors(place: Path, raw: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(place / "model.safetensors")


def read_dcp(place: Path, raw: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint import state_dict_loader

    found = {name: torch.full_like(value, 7) for name, value in raw.items()}
    state_dict_loader.load(found, checkpoint_id=place, no_dist=True)
    return found


def read_huggingface(place: Path, raw: dict[str, Any]) -> dict[str, Any]:
    import transformers

    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(place)
    return dict(opened.named_parameters())


READERS = {"safetensors": read_safetensors, "dcp": read_dcp, "huggingface": read_huggingface}


@pytest.mark.parametrize("kind", READERS)
def test_the_library_of_each_format_reads_the_same_weights(
    kind: str, fleet: Cluster, finished: int, tmp_path: Path
) -> None:
    import torch

    raw = raw_weights(fleet, finished, tmp_path)
    said = export(fleet, finished, kind, tmp_path / kind)
    (kept,) = fleet.baton_json("checkpoint", "list", str(finished))
    assert (kept["step"], kept["used_by"]) == (STEPS, ["head"])
    assert (said["step"], said["digest"]) == (STEPS, kept["digest"])
    found = READERS[kind](tmp_path / kind, raw)
    assert len(found) > 5
    assert all(torch.equal(value, raw[name]) for name, value in found.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["raw", kind])


def test_a_new_job_begins_with_what_was_exported(
    fleet: Cluster, models: Path, finished: int, tmp_path: Path
) -> None:
    export(fleet, finished, "safetensors", tmp_path / "out")
    done = fleet.baton(
        "checkpoint", "import", str(tmp_path / "out"), "--format", "safetensors",
        "--to", str(models / "weights"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert 'start_from = "' in done.stdout
    second = submit(fleet, models, start_from="weights")
    work.wait_succeeded(fleet, second)
    ended = work.events_named(work.lines(fleet, finished), "finished")[0]
    began = work.events_named(work.lines(fleet, second), "finished")[0]
    assert began["bits_per_byte_at_start"] == ended["bits_per_byte"]
    assert ended["bits_per_byte_at_start"] > ended["bits_per_byte"]


def test_what_cannot_be_exported_says_why_and_leaves_nothing(
    fleet: Cluster, finished: int, tmp_path: Path
) -> None:
    tries = {
        ("--format", "raw", "--step", "7"): "does not keep a checkpoint of step 7",
        ("--format", "safetensors", "--python", "/nowhere/python"): "cannot run /nowhere/python",
        ("--format", "huggingface", "--model", str(tmp_path)): "cannot open the configuration",
    }
    for words, sentence in tries.items():
        target = str(tmp_path / "made")
        done = fleet.baton("checkpoint", "export", str(finished), *words, "--to", target)
        assert done.returncode in (1, 2)
        assert sentence in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_pinned_checkpoint_outlives_its_job_and_can_be_read(
    fleet: Cluster, tmp_path: Path
) -> None:
    gate = work.Gate(tmp_path / "gate", 2)
    job_id = work.submit(fleet, gate.job(steps=9), keep_checkpoints=1)
    work.wait_committed(fleet, job_id, 2)
    listed = fleet.baton_json("checkpoint", "pin", str(job_id), "2")
    pinned = listed[0] if isinstance(listed, list) else listed
    gate.open_to(9)
    work.wait_succeeded(fleet, job_id)
    kept = fleet.baton_json("checkpoint", "list", str(job_id))
    assert [(one["step"], one["pinned"]) for one in kept] == [(9, False), (2, True)]
    # The list of what to keep that follows the end has made both nodes drop the others.
    for name in kept[1]["replicas"]:
        manifests = fleet.node_directory(name) / "chunks" / "manifests"
        fleet.wait_until(
            lambda folder=manifests: _steps(folder, job_id) == {2, 9},  # type: ignore[misc]
            work.DEADLINE_S,
            f"{name} keeps what is kept, and no more",
        )
    export(fleet, job_id, "raw", tmp_path / "two", "--digest", pinned["digest"])
    state = json.loads((tmp_path / "two" / "state.json").read_text())
    assert (state["step"], state["value"]) == (2, chain(2))


def _steps(folder: Path, job_id: int) -> set[int]:
    """The steps of this job's manifests on a node's disk."""
    documents = [json.loads(data) for _, data in work.contents_below(folder)]
    return {document["step"] for document in documents if document["job"] == job_id}


def test_one_holder_is_enough(fleet: Cluster, finished: int, tmp_path: Path) -> None:
    """The first has lost its chunks, the second gives them."""
    (first, *others) = fleet.job(finished).checkpoint.replicas
    assert others
    for path, data in work.contents_below(fleet.node_directory(first) / "chunks"):
        if len(data) > 1000:
            path.write_bytes(b"rot")
    export(fleet, finished, "raw", tmp_path / "raw")
    assert (tmp_path / "raw" / "model.safetensors").stat().st_size > 1000
    # Not removed: its agent may be at work there.
    other = fleet.node_directory(others[0])
    (other / "chunks").rename(other / "chunks.gone")
    done = fleet.baton(
        "checkpoint", "export", str(finished), "--format", "raw", "--to", str(tmp_path / "more")
    )
    assert done.returncode == 1
    assert "is not to be had" in done.stderr
    assert f"{first}: " in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
