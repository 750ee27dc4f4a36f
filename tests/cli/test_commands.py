"""Every command but `submit`, for people and for programs, against scripted answers."""

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import grpc
import pytest

from protos.baton.v1 import jobs_pb2, nodes_pb2, types_pb2
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal


def list_jobs(request: jobs_pb2.ListJobsRequest) -> jobs_pb2.ListJobsResponse:
    """Two open jobs and an ended one, filtered as the contract says."""
    everything = [samples.queued_job(), samples.active_job(), samples.ended_job()]
    wanted = [
        job
        for job in everything
        if (not request.phases or job.phase in request.phases)
        and (not request.before_job_id or job.id < request.before_job_id)
    ]
    page = wanted[: request.page_size]
    rest = len(wanted) > len(page)
    return jobs_pb2.ListJobsResponse(jobs=page, next_before_job_id=page[-1].id if rest else 0)


@pytest.fixture(autouse=True)
def fleet(fake: FakeCoordinator) -> None:
    """The samples, for those who ask."""
    fake.answers |= {
        "ListJobs": [list_jobs],
        "GetJob": [jobs_pb2.GetJobResponse(job=samples.active_job())],
        "ListNodes": [nodes_pb2.ListNodesResponse(nodes=samples.nodes())],
        "ListJobEvents": [
            lambda request: jobs_pb2.ListJobEventsResponse(
                events=[e for e in samples.events() if e.sequence == request.after_sequence + 1]
            )
        ],
        "ExplainJob": [jobs_pb2.ExplainJobResponse(sentence="needs 8 GPUs; n2 has 1 free")],
    }


def test_jobs_is_a_plain_table_in_a_pipe(baton: Baton, fake: FakeCoordinator) -> None:
    result = baton("jobs")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [re.split(r"\s{2,}", line.strip()) for line in lines] == [
        ["JOB", "NAME", "CLASS", "PHASE", "GPUS", "NODE", "STEP", "AGE", "REASON"],
        [
            *("1234567890123", "[red]a name that is longer than its column", "spare", "queued"),
            *("8", "-", "-", "30s", "needs 8 GPUs on one node; the largest free block is 1 on n2"),
        ],
        [
            *("12", "finetune-7b", "guaranteed", "active", "2", "n2", "120/500", "1h02m"),
            "runs on n2, where a replica of its checkpoint of step 100 lies",
        ],
        [
            *("3", "head", "standard", "failed", "0", "n1", "7", "1d03h"),
            "failed 4 times in a row without a new checkpoint; the last exit code was 1",
        ],
    ]
    assert "\x1b" not in result.stdout
    # Columns are aligned: every reason begins where its title does.
    start = lines[0].index("REASON")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    assert baton("ps").stdout == result.stdout
    open_request, ended_request = fake.requests[:2]
    assert list(open_request.phases) == [1, 2, 3, 4]
    assert (list(ended_request.phases), ended_request.page_size) == ([5, 6, 7], 20)


def test_jobs_in_json(baton: Baton) -> None:
    after, before = baton("jobs", "--json"), baton("--json", "jobs")
    jobs = json.loads(after.stdout)
    assert json.loads(before.stdout)[0]["reason"] == jobs[0]["reason"]
    assert [job["id"] for job in jobs] == [1234567890123, 12, 3]
    queued, active, _ = jobs
    assert (queued["phase"], queued["progress"], queued["checkpoint"]) == ("queued", None, None)
    assert (queued["end_time"], queued["attempts"]) == (None, [])
    assert active["spec"]["job_class"] == "guaranteed"
    assert active["spec"]["grace_ms"] == 120_000
    assert active["spec"]["gpu_memory_bytes_min"] == 40 * 10**9
    assert active["progress"] == {
        "step": 120,
        "total_steps": 500,
        "metrics": {"accuracy": 0.5, "loss": 1.25},
    }
    assert active["checkpoint"]["digest"] == samples.DIGEST
    lost, running = active["attempts"]
    assert (lost["phase"], lost["exit_code"], lost["restored_step"]) == ("lost", None, None)
    assert (running["phase"], running["end_time"], running["restored_step"]) == (
        "running",
        None,
        100,
    )
    assert active["submit_time"].endswith("Z")
    assert datetime.fromisoformat(active["submit_time"]).tzinfo is not None


@pytest.mark.parametrize(
    ("arguments", "phases", "project", "ids"),
    [
        (["--all"], [], "", [1234567890123, 12, 3]),
        (["--phase", "failed"], [6], "", [3]),
        (["--phase", "failed", "--phase", "active"], [6, 3], "", [12, 3]),
        (["--project", "vision"], [1, 2, 3, 4], "vision", [1234567890123, 12, 3]),
    ],
)
def test_jobs_are_chosen_by_the_coordinator(
    *,
    baton: Baton,
    fake: FakeCoordinator,
    arguments: list[str],
    phases: list[int],
    project: str,
    ids: list[int],
) -> None:
    result = baton("jobs", "--json", *arguments)
    assert [job["id"] for job in json.loads(result.stdout)] == ids
    assert list(fake.requests[0].phases) == phases
    assert {request.project for request in fake.requests} == {project}


def test_a_limit_says_that_it_cut(baton: Baton, fake: FakeCoordinator) -> None:
    result = baton("jobs", "--all", "--limit", "2", "--json")
    assert [job["id"] for job in json.loads(result.stdout)] == [1234567890123, 12]
    assert result.stderr == "baton: there are more than 2 such jobs; see --limit\n"
    result = baton("jobs", "--limit", "1", "--json")
    assert [job["id"] for job in json.loads(result.stdout)] == [1234567890123]
    assert "more than 1" in result.stderr


def test_pages_are_put_together(baton: Baton, fake: FakeCoordinator) -> None:
    def page(request: jobs_pb2.ListJobsRequest) -> jobs_pb2.ListJobsResponse:
        newest = request.before_job_id or 6
        job = types_pb2.Job(id=newest - 1)
        return jobs_pb2.ListJobsResponse(jobs=[job], next_before_job_id=job.id if job.id > 1 else 0)

    fake.answers["ListJobs"] = [page]
    result = baton("jobs", "--all", "--json")
    assert [job["id"] for job in json.loads(result.stdout)] == [5, 4, 3, 2, 1]
    assert result.stderr == ""


def test_an_empty_fleet(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse()]
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse()]
    assert baton("jobs", "--json").stdout == "[]\n"
    said = baton("jobs")
    assert (said.stdout, said.stderr) == ("", "baton: no job yet; see `baton submit --help`\n")
    assert baton("jobs", "--phase", "held").stderr == "baton: there is no such job\n"
    assert baton("nodes", "--json").stdout == "[]\n"
    said = baton("nodes")
    assert said.stdout == "", "no headings over nothing"
    assert "no node has joined yet" in said.stderr


def test_job_shows_everything(baton: Baton, fake: FakeCoordinator) -> None:
    result = baton("job", "12")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    for part in (
        "Job 12  finetune-7b",
        "active, on n2 for 3m1",
        "runs on n2, where a replica",
        "2 GPUs, H100 or A100, at least 40 GB each",
        "python train.py --data 'my corpus'",
        "/home/ada",
        "WANDB_MODE",
        "step 120 of 500 (24%), accuracy 0.5, loss 1.25",
        "step 100, 1.21 GiB on n2, n3, committed 4",
        samples.DIGEST,
        "1 in a row, of at most 3",
        "SIGTERM, then 2m of grace",
        "(1h02m ago)",
    ):
        assert part in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert rows[0][:8] == ["12.1", "n1", "lost", "10m05s", "6m45s", "75.0%", "-", "-"]
    assert rows[1][:3] == ["12.2", "n2", "running"]
    assert rows[1][5:] == ["-", "100", "-", "n3", "-"]
    assert fake.requests == [jobs_pb2.GetJobRequest(job_id=12)]
    document = json.loads(baton("job", "12", "--json").stdout)
    assert document["id"] == 12


def test_job_that_ended_and_one_that_waits(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["GetJob"] = [
        jobs_pb2.GetJobResponse(job=samples.ended_job()),
        jobs_pb2.GetJobResponse(job=samples.queued_job()),
    ]
    ended = baton("job", "3").stdout
    assert re.search(r"phase +failed, after 3h03m", ended)
    assert re.search(r"progress +step 7$", ended, re.MULTILINE)
    waiting = baton("job", "1234567890123").stdout
    assert re.search(r"phase +queued, 30s after submission", waiting)
    assert "Attempts" not in waiting
    assert "progress" not in waiting


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_of_several_jobs_each_is_asked(
    baton: Baton, fake: FakeCoordinator, flags: tuple[str, ...]
) -> None:
    """Once, in their order, whatever became of those before it."""
    ended = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "job 13 is cancelled: it has ended already"
    )
    done = [
        jobs_pb2.CancelJobResponse(job=types_pb2.Job(id=n, phase=types_pb2.JOB_PHASE_CANCELLED))
        for n in (12, 14)
    ]
    fake.answers["CancelJob"] = [done[0], ended, done[1]]
    result = baton("cancel", "12", "13", "14", "12", *flags)
    assert [request.job_id for request in fake.requests] == [12, 13, 14]
    assert (result.exit_code, result.stderr) == (1, f"baton: {ended.sentence}\n")
    lines = result.stdout.splitlines()
    if flags:
        assert [json.loads(line)["id"] for line in lines] == [12, 14]
    else:
        assert lines == ["job 12: cancelled", "job 14: cancelled"]


@pytest.mark.parametrize(
    ("verb", "method", "response", "request_type"),
    [
        ("cancel", "CancelJob", jobs_pb2.CancelJobResponse, jobs_pb2.CancelJobRequest),
        ("hold", "HoldJob", jobs_pb2.HoldJobResponse, jobs_pb2.HoldJobRequest),
        ("release", "ReleaseJob", jobs_pb2.ReleaseJobResponse, jobs_pb2.ReleaseJobRequest),
        ("requeue", "RequeueJob", jobs_pb2.RequeueJobResponse, jobs_pb2.RequeueJobRequest),
    ],
)
def test_verbs_of_a_job(
    *,
    baton: Baton,
    fake: FakeCoordinator,
    verb: str,
    method: str,
    response: Callable[..., Any],
    request_type: Callable[..., Any],
) -> None:
    job = types_pb2.Job(id=12, phase=types_pb2.JOB_PHASE_CANCELLING, reason="has 120 s to save")
    fake.answers[method] = [response(job=job)]
    result = baton(verb, "12")
    assert (result.exit_code, result.stdout) == (0, "job 12: cancelling; has 120 s to save\n")
    assert fake.requests == [request_type(job_id=12)]
    assert json.loads(baton(verb, "12", "--json").stdout)["phase"] == "cancelling"
    stopping = types_pb2.Attempt(id="12.1", node="n1", phase=types_pb2.ATTEMPT_PHASE_STOPPING)
    active = types_pb2.Job(
        id=12, phase=types_pb2.JOB_PHASE_ACTIVE, reason="runs on n1", attempts=[stopping]
    )
    fake.answers[method] = [response(job=active)]
    assert baton(verb, "12").stdout == "job 12: active; saves, and leaves n1\n"
    sentence = "job 12 has ended: cancelled"
    fake.answers[method] = [Refusal(grpc.StatusCode.FAILED_PRECONDITION, sentence)]
    result = baton(verb, "12")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"baton: {sentence}\n"


@pytest.mark.parametrize(
    ("verb", "method", "response", "request_type"),
    [
        ("cordon", "CordonNode", nodes_pb2.CordonNodeResponse, nodes_pb2.CordonNodeRequest),
        ("drain", "DrainNode", nodes_pb2.DrainNodeResponse, nodes_pb2.DrainNodeRequest),
        ("uncordon", "UncordonNode", nodes_pb2.UncordonNodeResponse, nodes_pb2.UncordonNodeRequest),
    ],
)
def test_verbs_of_a_node(
    *,
    baton: Baton,
    fake: FakeCoordinator,
    verb: str,
    method: str,
    response: Callable[..., Any],
    request_type: Callable[..., Any],
) -> None:
    node = types_pb2.Node(id="n1", intent=types_pb2.NODE_INTENT_DRAINING, reason="1 attempt left")
    fake.answers[method] = [response(node=node)]
    result = baton(verb, "n1")
    assert (result.exit_code, result.stdout) == (0, "node n1: draining; 1 attempt left\n")
    assert fake.requests == [request_type(node="n1")]
    assert json.loads(baton(verb, "n1", "--json").stdout)["intent"] == "draining"
    fake.answers[method] = [Refusal(grpc.StatusCode.NOT_FOUND, "there is no node n1")]
    assert baton(verb, "n1").stderr == "baton: there is no node n1\n"


def test_a_node_is_forgotten(baton: Baton, fake: FakeCoordinator) -> None:
    node = types_pb2.Node(id="n1", phase=types_pb2.NODE_PHASE_LOST)
    fake.answers["ForgetNode"] = [nodes_pb2.ForgetNodeResponse(node=node)]
    result = baton("forget", "n1")
    assert (result.exit_code, result.stdout) == (0, "node n1: forgotten\n")
    assert json.loads(baton("forget", "n1", "--lose-checkpoints", "--json").stdout)["id"] == "n1"
    assert fake.requests == [
        nodes_pb2.ForgetNodeRequest(node="n1"),
        nodes_pb2.ForgetNodeRequest(node="n1", lose_checkpoints=True),
    ]
    sentence = "n1 is connected, and would join again at once"
    fake.answers["ForgetNode"] = [Refusal(grpc.StatusCode.FAILED_PRECONDITION, sentence)]
    result = baton("forget", "n1")
    assert (result.exit_code, result.stderr) == (1, f"baton: {sentence}\n")


def test_the_rate_of_a_nodes_telemetry(baton: Baton, fake: FakeCoordinator) -> None:
    node = types_pb2.Node(id="n1", telemetry_rate=types_pb2.TELEMETRY_RATE_WATCH, reason="drained")
    fake.answers["SetTelemetryRate"] = [nodes_pb2.SetTelemetryRateResponse(node=node)]
    result = baton("telemetry", "n1", "--rate", "watch")
    assert (result.exit_code, result.stdout) == (0, "node n1: telemetry watch\n")
    rate = types_pb2.TELEMETRY_RATE_WATCH
    assert fake.requests == [nodes_pb2.SetTelemetryRateRequest(node="n1", rate=rate)]
    baton("telemetry", "n1", "--rate", "own")
    assert fake.requests[1] == nodes_pb2.SetTelemetryRateRequest(node="n1")
    assert baton("telemetry", "n1", "--rate", "often").exit_code == 2
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[node])]
    assert "drained; telemetry watch, by order" in baton("nodes").stdout
    assert json.loads(baton("nodes", "--json").stdout)[0]["telemetry_rate"] == "watch"


def test_nodes_show_what_is_not_known_as_a_dash(baton: Baton) -> None:
    result = baton("nodes")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()[1:]]
    assert rows == [
        [
            *("n1", "up", "open", "1/2 H100 80GB HBM3", "45%", "60/160 GiB", "71 °C", "720 W"),
            *("12.2 14.1", "-"),
        ],
        [
            *("n2", "up", "draining", "1/1 RTX 4090, 1/1 H100 80GB HBM3", "0%", "-", "40 °C"),
            *("-", "-", "draining for 12 s: hands off 1 attempt"),
        ],
        [
            *("n3", "lost", "open", "0/0 H100 80GB HBM3 (1 absent)", "-", "-", "-", "-", "-"),
            "not heard for 34 s",
        ],
        ["n4", "up", "open", *"------", "no GPUs: Driver Not Loaded"],
    ]


def test_nodes_in_json_keep_unknown_apart_from_zero(baton: Baton) -> None:
    nodes = json.loads(baton("nodes", "--json").stdout)
    assert [node["id"] for node in nodes] == ["n1", "n2", "n3", "n4"]
    idle, silent = (gpu["telemetry"] for gpu in nodes[1]["gpus"])
    assert (idle["utilization_ratio"], idle["memory_used_bytes"]) == (0.0, 0)
    assert (silent["utilization_ratio"], silent["power_mw"]) == (None, None)
    assert silent["error"] == "GPU is lost"
    assert nodes[0]["host"]["cpu_count"] == 64
    assert (nodes[2]["telemetry"], nodes[2]["gpus"][0]["telemetry"]) == (None, None)
    assert nodes[2]["gpus"][0]["phase"] == "absent"


def test_figures_that_nobody_has_read_for_a_while_are_not_shown(
    baton: Baton, fake: FakeCoordinator
) -> None:
    old = types_pb2.GpuTelemetry(utilization_ratio=0.5, temperature_celsius=60)
    old.age.FromSeconds(91)
    gpu = types_pb2.Gpu(
        uuid="GPU-1", name="NVIDIA H100", phase=types_pb2.GPU_PHASE_FREE, telemetry=old
    )
    node = types_pb2.Node(id="n1", gpus=[gpu])
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[node])] * 2
    table = baton("nodes").stdout
    assert "GPUs were last read 91 s ago" in table
    assert "60 °C" not in table
    (shown,) = json.loads(baton("nodes", "--json").stdout)[0]["gpus"]
    assert (shown["telemetry"]["temperature_celsius"], shown["telemetry"]["age_s"]) == (60, 91.0)


def test_many_attempts_are_counted_and_not_cut(baton: Baton, fake: FakeCoordinator) -> None:
    node = types_pb2.Node(id="n1", attempts=["1.1", "2.1", "3.1", "4.1"])
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[node])]
    assert "1.1 2.1 +2" in baton("nodes").stdout


def test_events(baton: Baton, fake: FakeCoordinator) -> None:
    result = baton("events", "12")
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    assert rows[0] == ["TIME", "AGE", "EVENT", "ATTEMPT", "NODE", "MESSAGE"]
    assert rows[1][1:] == ["1h02m", "job.submitted", "-", "-", "by ada"]
    assert rows[2][2:] == ["attempt.assigned", "12.1", "n1", "n1 has 2 free GPUs of 2"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", rows[1][0])
    assert [request.after_sequence for request in fake.requests] == [0, 1, 2]
    lines = baton("events", "12", "--json").stdout.splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["time"].endswith("Z")


def test_explain(baton: Baton) -> None:
    assert baton("explain", "12").stdout == "needs 8 GPUs; n2 has 1 free\n"
    assert json.loads(baton("explain", "12", "--json").stdout) == {
        "job_id": 12,
        "sentence": "needs 8 GPUs; n2 has 1 free",
        "expected_start": None,
        "expected_end_time": None,
        "suggestions": [],
    }


def test_explain_has_its_figures_for_programs(baton: Baton, fake: FakeCoordinator) -> None:
    answer = jobs_pb2.ExplainJobResponse(
        sentence="waits",
        suggestions=[jobs_pb2.Suggestion(change="--gpus 2", outcome="now on 2 x A100 on n3")],
    )
    answer.expected_start.time.FromMilliseconds(1_790_000_000_000)
    answer.expected_start.nodes.append("n07")
    answer.expected_start.where = "4 x A100 on n07"
    answer.expected_start.after_job_id = 812
    fake.answers["ExplainJob"] = [answer]
    told = json.loads(baton("explain", "12", "--json").stdout)
    assert told["expected_start"] == {
        "time": "2026-09-21T14:13:20Z",
        "nodes": ["n07"],
        "where": "4 x A100 on n07",
        "after_job_id": 812,
    }
    assert told["suggestions"] == [{"change": "--gpus 2", "outcome": "now on 2 x A100 on n3"}]


def test_logs_are_bytes_and_notices_go_elsewhere(baton: Baton, fake: FakeCoordinator) -> None:
    part = jobs_pb2.StreamLogsResponse
    fake.answers["StreamLogs"] = [
        [
            part(attempt="12.1", node="n1", data=b"\x1b[31mred\x00\xff\r\xc3"),
            part(attempt="12.2", node="n2", data=b"other\n", notice="12.2 goes on from step 100"),
            part(attempt="12.1", node="n1", data=b"\xa9\xc3"),
        ]
    ]
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    result = baton("logs", "-f", "--tail-bytes", "7", "12")
    assert result.stdout_bytes == b"\x1b[31mred\x00\xff\r\xc3other\n\xa9\xc3"
    assert result.stderr.splitlines() == [
        "baton: from here on attempt 12.2, on n2",
        "baton: 12.2 goes on from step 100",
        "baton: from here on attempt 12.1, on n1",
    ]
    assert fake.requests[1:] == [jobs_pb2.StreamLogsRequest(job_id=12, follow=True, tail_bytes=7)]
    lines = [json.loads(line) for line in baton("logs", "12", "--json").stdout.splitlines()]
    assert [(line["attempt"], line["text"]) for line in lines] == [
        ("12.1", "\x1b[31mred\x00\ufffd\r"),
        ("12.2", "other\n"),
        ("12.1", "é"),
        ("12.1", "\ufffd"),
    ]
    assert lines[1] == {
        "attempt": "12.2",
        "node": "n2",
        "text": "other\n",
        "notice": "12.2 goes on from step 100",
    }


def test_who_follows_a_job_that_waits_is_told_why_nothing_comes(
    baton: Baton, fake: FakeCoordinator
) -> None:
    job = types_pb2.Job(id=12, phase=types_pb2.JOB_PHASE_QUEUED, reason="needs 9 GPUs")
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    fake.answers["StreamLogs"] = [[jobs_pb2.StreamLogsResponse(data=b"1\n", next_offset=2)]]
    result = baton("logs", "-f", "12")
    assert (result.exit_code, result.stdout) == (0, "1\n")
    said = "baton: job 12 is queued: needs 9 GPUs; its output follows when it runs\n"
    assert result.stderr == said


def test_logs_of_what_never_ran_say_so(baton: Baton, fake: FakeCoordinator) -> None:
    told = jobs_pb2.StreamLogsResponse(attempt="12.1", node="n1", next_offset=-1)
    queued = types_pb2.Job(id=12, phase=types_pb2.JOB_PHASE_QUEUED, reason="needs 9 GPUs")
    failed = types_pb2.Job(id=12, phase=types_pb2.JOB_PHASE_FAILED, reason="no directory /a")
    over = "job 12 has failed, and there is no output of it: no directory /a"
    for job, said in ((queued, "job 12 is queued: it has no output so far"), (failed, over)):
        fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
        fake.answers["StreamLogs"] = [[told]]
        for more in ((), ("--json",)):
            result = baton("logs", "12", *more)
            assert (result.exit_code, result.stdout) == (0, "")
            assert result.stderr == f"baton: {said}\n"


def test_what_a_job_says_of_itself_cannot_drive_a_terminal(
    baton: Baton, fake: FakeCoordinator
) -> None:
    job = types_pb2.Job(id=1, spec=types_pb2.JobSpec(name="a\x1b[2Jb"), reason="one\ntwo\x9b")
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse(jobs=[job]), jobs_pb2.ListJobsResponse()]
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    for arguments in (("jobs",), ("job", "1")):
        shown = baton(*arguments).stdout
        assert "a\ufffd[2Jb" in shown
        assert "one two\ufffd" in shown


def test_a_phase_of_a_newer_coordinator_is_shown(baton: Baton, fake: FakeCoordinator) -> None:
    job = types_pb2.Job.FromString(types_pb2.Job(id=1).SerializeToString() + b"\x18\x63")
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=job)]
    assert json.loads(baton("job", "1", "--json").stdout)["phase"] == "unknown_99"
