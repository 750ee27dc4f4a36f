"""Traces that strangers bring: what does no harm is read, and the rest says what to change."""

import gzip
from pathlib import Path

import pytest

from coordinator.sim.inputs import read_fleet, read_jobs, read_pairs
from coordinator.sim.model import SimJob
from coordinator.sim.toml_file import BadFile

HEAD = "job,arrival_s,gpus,steps,A100,K80\n"
LINE = "1,60,1,9,2,\n"
ZIPPED = gzip.compress((HEAD + LINE).encode(), mtime=0)  # the same bytes in each worker
TARRED = gzip.compress(b"\0" * 257 + b"ustar", mtime=0)
MEANT = SimJob(
    job_id=1, gpus=1, steps=9.0, rates={"A100": 2.0}, rank=1, arrival_ms=60_000, restart_s=60.0
)


def read(folder: Path, data: bytes | str) -> list[SimJob]:
    fleet, trace = folder / "fleet.toml", folder / "jobs.csv"
    fleet.write_text("[gpus.A100]\ncount = 4\n[gpus.K80]\ncount = 2\n")
    trace.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_jobs(trace, read_fleet(fleet, 0))


@pytest.mark.parametrize(
    "data",
    [
        HEAD + LINE,
        ("\ufeff" + HEAD + LINE).replace("\n", "\r\n"),
        "\n  \n" + HEAD + "\n,,,,,\n" + LINE + "\n",
        HEAD.replace(",", " , ") + LINE.replace(",", " , "),
        HEAD.replace("\n", ",,\n") + LINE.replace("\n", ",,\n"),
        HEAD + LINE.replace("\n", ",,,\n"),
        "K80,steps,A100,job,gpus,arrival_s\n,9,2,1,1,60\n",
        "".join(f'"{cell}",' for cell in HEAD.strip().split(",")) + "\n" + LINE,
        ZIPPED,
    ],
)
def test_a_table_is_read_however_it_was_written(tmp_path: Path, data: bytes | str) -> None:
    assert read(tmp_path, data) == [MEANT]


def test_thousands_that_come_at_once_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    numbers = [(n * 7) % 5_003 for n in range(1, 5_003)]
    data = HEAD + "".join(f"{n},1700000000,1,0,2,\n" for n in numbers)
    assert [job.job_id for job in read(tmp_path, data)] == numbers


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (HEAD + LINE.replace("\n", ",,7\n"), "line 2: there are more cells than columns"),
        (HEAD.replace("\n", ",\n") + LINE.replace("\n", ",x\n"), "line 2: 'x' is in a column that"),
        (HEAD + '1,60,"1,9,2,\n' + LINE * 90, "line 92: gpus is '1,9,2,"),
        (HEAD + "1,1700000000000,1,9,2,\n", "divide milliseconds by 1000"),
        (HEAD + "1,60,1,9,1e-300,\n", "of 87,600 at most; steps or a rate is wrong"),
        ("\n\n", "is empty; its first line names the columns"),
        (ZIPPED[:-12], "cannot be unpacked (Compressed file ended"),
        (TARRED, "is an archive of files; unpack it and name one"),
        (b"PK\x03\x04 and more", "is a zip archive or a spreadsheet; save what it holds as CSV"),
        (
            "job_id,submit_time,num_gpu,duration,iteration,A100\n1,0,1,9,9,1\n",
            "arrival_s, gpus, steps; rename job_id to job, submit_time to arrival_s, num_gpu to"
            " gpus, duration to steps",
        ),
        (
            "job_id,total_steps,gpus,arrival_s,priority_weight,A100\n1,9,1,0,1,2\n",
            "'job_id', 'total_steps', 'priority_weight' are no columns and no GPU types of the"
            " fleet; rename job_id to job, total_steps to steps, and leave the others out",
        ),
        ("Job,arrival_s,GPUs,steps,A100\n1,0,1,9,2\n", "rename Job to job, GPUs to gpus"),
    ],
)
def test_what_cannot_be_read_says_what_to_change(
    tmp_path: Path, data: bytes | str, sentence: str
) -> None:
    with pytest.raises(BadFile) as caught:
        read(tmp_path, data)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path)), "not the rest of the file"


def test_pairs_are_read_as_jobs_are(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv.gz"
    path.write_bytes(gzip.compress(b" gpu_type,model, beside,steps_per_s,\r\nA100, m,n , 2.5,\r\n"))
    assert read_pairs(path) == {("A100", "m", "n"): 2.5}
