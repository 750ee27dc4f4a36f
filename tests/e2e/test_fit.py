"""`baton fit` against a real coordinator: before anything was submitted, and by what has run."""

import json
from pathlib import Path
from typing import Any

import pytest

from protos.baton.v1 import jobs_pb2
from tests.e2e import work
from tests.e2e.cluster import Cluster
from tests.fakenvml.build import a100, h100, rtx4090

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-fit")]

CONFIG = {
    "model": "language",
    "train_data": "text.txt",
    "tokenizer": "bytes",
    "window_tokens": 32,
    "batch_size": 4,
    "steps": 1_000_000,
    "evaluate_every": 100_000,
    "checkpoint_every_s": 0,
}
JOB = """
trainer = "finetune"
project = "demo"
gpus = 1
gpu_types = ["H100", "A100", "4090"]
workdir = "{models}"
config = "{config}"
"""


def width(fit: dict[str, Any]) -> float:
    """Of the band, as a ratio."""
    speed = fit["speed"]
    return float(speed["steps_per_second_high"] / speed["steps_per_second_low"])


def test_a_job_is_judged_before_it_is_submitted_and_by_what_it_did(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(models=models, config=tmp_path / "config.json"), "utf-8")
    with Cluster(tmp_path / "cluster") as fleet:
        fleet.start_coordinator()
        for node, gpus in (("n1", h100(2)), ("n2", a100(1, node="n2")), ("n3", rtx4090(1))):
            fleet.start_agent(node, gpus)
        fleet.wait_for_nodes("n1", "n2", "n3")

        def ask() -> dict[str, dict[str, Any]]:
            document = json.loads(fleet.baton("fit", str(job), "--json").stdout)
            return {fit["gpu_type"].split()[1]: fit for fit in document["fits"]}

        before = ask()
        assert sorted(before) == ["A100-SXM4-80GB", "GeForce", "H100"]
        for fit in before.values():
            assert fit["fitting"] == "fits"
            assert fit["tokens_per_step"] == 4 * 32
            assert fit["speed_why"] == "estimated from facts"
            assert 0 < fit["speed"]["steps_per_second_low"] < fit["speed"]["steps_per_second"]
            assert fit["usd_per_hour"] > 0
            assert fit["unsuited"] == ""
        assert not list(fleet.jobs.ListJobs(jobs_pb2.ListJobsRequest()).jobs)
        table = fleet.baton("fit", str(job), "--price", "4090=0.5").stdout
        assert "NVIDIA GeForce RTX 4090  1 of 1  fits" in table
        assert "  0.50  " in table

        for node in ("n2", "n3"):
            fleet.baton("cordon", node)
        fleet.baton("submit", str(job))

        def measured() -> dict[str, dict[str, Any]] | None:
            now = ask()
            return now if now["H100"]["speed_why"].startswith("measured: 1 run") else None

        after = fleet.wait_until(measured, work.JOB_DEADLINE_S, "the speed of the run is believed")
        assert width(after["H100"]) < width(after["A100-SXM4-80GB"]) < width(before["H100"])
        assert after["A100-SXM4-80GB"]["speed_why"] == (
            "estimated from 1 run of this job elsewhere and facts"
        )
        assert after["GeForce"]["unsuited"] == "none of them takes work at present"
        fleet.baton("cancel", "1")
