"""`baton submit --share-gpu auto`: what is sent, and what is counted before it is."""

from pathlib import Path

import pytest

from protos.baton.v1 import jobs_pb2
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator
from tests.cli.test_submit import here as here
from tests.cli.test_submit import sent


@pytest.mark.parametrize("share", ["--share-gpu auto:8GiB", "job.toml"])
def test_a_share_where_that_pays(
    baton: Baton, fake: FakeCoordinator, here: Path, share: str
) -> None:
    (here / "job.toml").write_text('share_gpu = "auto:8GiB"\n')
    assert baton("submit", *share.split(), "--", "true").exit_code == 0
    asked = sent(fake)
    assert (asked.gpus, asked.shared_gpu_memory_bytes, asked.share_automatic) == (
        1,
        8 * 2**30,
        True,
    )


def fits(*answers: tuple[jobs_pb2.Fitting.ValueType, int, str]) -> jobs_pb2.FitJobResponse:
    found = [jobs_pb2.Fit(fitting=f, memory_needed_bytes=n, memory_why=w) for f, n, w in answers]
    return jobs_pb2.FitJobResponse(fits=found)


def test_how_much_a_training_takes_is_counted(
    baton: Baton, fake: FakeCoordinator, here: Path
) -> None:
    (here / "c.json").write_text('{"model": "m"}')
    answer = fits(
        (jobs_pb2.FITTING_FITS, 8 * 10**9, "fits"),
        (jobs_pb2.FITTING_DOES_NOT_FIT, 8 * 10**9, "does not fit"),
    )
    fake.answers["FitJob"] = [answer]
    done = baton("submit", "--share-gpu", "auto", "--trainer", "lora", "--config", "c.json")
    assert done.exit_code == 0
    assert "it is counted to take 8.83 GiB of a GPU's memory at most" in done.stderr
    asked, wanted = (request.spec for request in fake.requests)
    assert (asked.share_automatic, asked.shared_gpu_memory_bytes) == (False, 0)
    assert (wanted.share_automatic, wanted.shared_gpu_memory_bytes) == (True, 9046 * 2**20)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (fits(), "no node with a GPU has joined yet"),
        (fits((jobs_pb2.FITTING_UNSPECIFIED, 0, "unknown: a command")), "is not known (a command)"),
        (
            fits((jobs_pb2.FITTING_ACCUMULATES, 1, "4 of 8 at once")),
            "it fills a GPU and leaves nothing to share (4 of 8 at once)",
        ),
    ],
)
def test_a_share_that_nobody_can_count_asks_for_its_size(
    baton: Baton, fake: FakeCoordinator, answer: jobs_pb2.FitJobResponse, why: str
) -> None:
    fake.answers["FitJob"] = [answer]
    done = baton("submit", "--share-gpu", "auto", "--", "true")
    assert done.exit_code == 2
    assert why in done.stderr
    assert "say how much: --share-gpu auto:8GiB" in done.stderr
    assert len(fake.requests) == 1, "nothing was submitted"


@pytest.mark.parametrize("wrong", ["auto:", "auto:0", "automatic", "auto:8G"])
def test_what_is_no_share(baton: Baton, fake: FakeCoordinator, here: Path, wrong: str) -> None:
    (here / "job.toml").write_text(f'command = ["true"]\nshare_gpu = "{wrong}"\n')
    for words in (["--share-gpu", wrong, "--", "true"], ["job.toml"]):
        done = baton("submit", *words)
        assert (done.exit_code, fake.requests) == (2, [])


def test_a_misspelt_auto_is_told_of_auto(baton: Baton, fake: FakeCoordinator) -> None:
    done = baton("submit", "--share-gpu", "autp", "--", "true")
    assert done.exit_code == 2
    assert "auto:8GiB" in done.stderr
    assert not fake.requests
