"""How commands end: four exit classes, Ctrl-C, a reader that goes away, TLS, and a real
terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest

from coordinator.cli import client
from protos.baton.v1 import jobs_pb2, nodes_pb2, types_pb2
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal
from tests.e2e.certificates import Authority
from tests.held_port import held_port
from tests.wire.slow_link import slow_link

# For a real process on a busy machine; a test that needs it has failed.
DEADLINE_S = 60

BATON = [sys.executable, "-m", "coordinator.cli"]


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nobody listens."""
    with held_port() as port:
        yield f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    "arguments", [["jobs"], ["job", "1"], ["logs", "1"], ["nodes"], ["submit", "--", "true"]]
)
def test_nobody_there_is_3(baton: Baton, nowhere: str, arguments: list[str]) -> None:
    result = baton(*arguments, address=nowhere)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == (
        f"baton: cannot reach the coordinator at {nowhere}: connection refused; "
        "is it running? see --coordinator\n"
    ), "nothing of a request that may have arrived"


def test_a_handshake_may_take_longer_than_the_pause_between_tries(
    fake: FakeCoordinator, baton: Baton
) -> None:
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse()]
    with slow_link(fake.address) as address:
        result = baton("nodes", address=address)
    assert result.exit_code == 0, result.stderr


def test_a_name_that_does_not_resolve_is_3(baton: Baton, tmp_path: Path) -> None:
    flags = Authority(tmp_path / "fleet").issue("member").flags()
    result = baton("--coordinator", "no-such-host.invalid:1", *flags, "jobs")
    assert result.exit_code == 3
    assert "cannot reach the coordinator at no-such-host.invalid:1: " in result.stderr


def test_a_log_whose_coordinator_stays_away_is_3_and_says_how_to_go_on(
    baton: Baton, fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FOLLOW_AWAY_S_MAX", 0.0)

    def stop() -> jobs_pb2.StreamLogsResponse:
        threading.Thread(target=fake.stop).start()
        return jobs_pb2.StreamLogsResponse()

    gone = threading.Event()

    def wait() -> jobs_pb2.StreamLogsResponse:
        gone.wait(DEADLINE_S)
        return jobs_pb2.StreamLogsResponse()

    part = jobs_pb2.StreamLogsResponse(data=b"1\n", next_offset=2)
    fake.answers["StreamLogs"] = [[part, stop, wait]]
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    result = baton("logs", "-f", "12")
    gone.set()
    assert (result.exit_code, result.stdout) == (3, "1\n")
    assert result.stderr.endswith("; go on with: baton logs -f --tail-bytes 2000 12\n")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_followed_log_goes_on_where_its_coordinator_broke_off(
    baton: Baton, fake: FakeCoordinator, code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FOLLOW_PAUSES_S", (0.0,))
    part = partial(jobs_pb2.StreamLogsResponse, node="n1")
    gone = Refusal(code, "gone")
    fake.answers["StreamLogs"] = [
        [part(attempt="12.1", data=b"1\n", next_offset=2), gone],
        gone,
        [
            part(attempt="12.1", next_offset=-1),
            part(attempt="12.2", data=b"2\n", next_offset=2),
            gone,
        ],
        [part(attempt="12.2", data=b"3\n", next_offset=4)],
    ]  # fmt: skip
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    result = baton("logs", "-f", "--tail-bytes", "9", "--rank", "1", "12")
    assert (result.exit_code, result.stdout) == (0, "1\n2\n3\n")
    # Once for each time that it is away.
    said = f"baton: {fake.address} does not answer; the output goes on when it does\n"
    assert result.stderr == f"{said}baton: from here on attempt 12.2, on n1\n{said}"
    asked = partial(jobs_pb2.StreamLogsRequest, job_id=12, follow=True, tail_bytes=9, rank=1)
    again = asked(after_attempt="12.1", after_offset=2)
    assert fake.requests[1:] == [asked(), again, again, asked(after_attempt="12.2", after_offset=2)]


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        ("logs -f 12", b"1\n"),  # of an older coordinator, which would begin again
        ("logs 12", b""),
    ],
)
def test_a_log_that_cannot_go_on_ends(
    baton: Baton, fake: FakeCoordinator, arguments: str, data: bytes
) -> None:
    part = jobs_pb2.StreamLogsResponse(attempt="12.1", node="n1", data=data)
    fake.answers["StreamLogs"] = [[part, Refusal(grpc.StatusCode.UNAVAILABLE, "gone")]]
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    result = baton(*arguments.split())
    assert (result.exit_code, result.stdout_bytes) == (1, data)
    assert result.stderr.startswith("baton: gone")


def test_unavailable_said_by_the_coordinator_is_1(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListNodes"] = [Refusal(grpc.StatusCode.UNAVAILABLE, "not durable\nnow")]
    result = baton("nodes")
    assert (result.exit_code, result.stderr) == (1, "baton: not durable now\n")


def test_a_coordinator_without_the_call_is_1(baton: Baton, fake: FakeCoordinator) -> None:
    fake.answers["ListNodes"] = [Refusal(grpc.StatusCode.UNIMPLEMENTED, "")]
    result = baton("nodes")
    assert result.exit_code == 1
    assert "does not know this call; is it an older version?" in result.stderr


def test_no_answer_in_time_is_3(baton: Baton, fake: FakeCoordinator) -> None:
    gone = threading.Event()

    def never(request: object) -> Refusal:
        gone.wait(DEADLINE_S)
        return Refusal(grpc.StatusCode.CANCELLED, "")

    fake.answers["ListNodes"] = [never]
    try:
        result = baton("--timeout-s", "0.2", "nodes")
    finally:
        gone.set()
    assert result.exit_code == 3
    assert result.stderr == (
        f"baton: the coordinator at {fake.address} has not answered within 0.2 s; see --timeout-s\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--coordinator example.org:7070 jobs", "example.org:7070 is not on this machine"),
        ("jobs --coordinator 10.0.0.1:7070", "only with TLS: give --tls-cert, --tls-key and"),
        ("--coordinator 0.0.0.0:7070 jobs", "0.0.0.0:7070 is not on this machine"),
        ("--coordinator 127.0.0.1 jobs", "--coordinator must be HOST:PORT"),
        ("--coordinator localhost:0 jobs", "--coordinator must be HOST:PORT"),
        ("--timeout-s 0 jobs", "--timeout-s must be more than 0"),
        ("--timeout-s nan jobs", "--timeout-s must be more than 0"),
        (f"--tls-cert {__file__} jobs", "belong together: give all three or none"),
        ("--tls-cert /no/such/file jobs", "does not exist"),
        *(
            (f"job {word}", f"'{word}' is not a valid job number")
            for word in ("x", "1e3", "12_", "²")
        ),
        ("job 0", "'0' is not a valid job number"),
        ("job 9223372036854775808", "is not a valid job number"),
        ("job twelve", "'twelve' is not a valid job number"),
        ("job", "Missing argument 'JOB'"),
        ("jobs --phase lost", "'lost' is not one of"),
        ("jobs --all --phase held", "--all and --phase contradict each other"),
        ("logs --tail-bytes -1 1", "-1 is not in the range"),
        ("jbos", "No such command 'jbos'"),
        ("completion tcsh", "'tcsh' is not one of"),
    ],
)
def test_wrong_usage_is_2(baton: Baton, fake: FakeCoordinator, arguments: str, said: str) -> None:
    result = baton(*arguments.split())
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert fake.requests == []


@pytest.mark.parametrize("host", ["localhost", "[::1]", "127.8.9.1"])
def test_loopback_needs_no_tls(baton: Baton, nowhere: str, host: str) -> None:
    port = nowhere.rpartition(":")[2]
    assert baton("jobs", "--coordinator", f"{host}:{port}").exit_code == 3


def test_the_later_option_wins(baton: Baton, fake: FakeCoordinator, nowhere: str) -> None:
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse()]
    assert baton("--coordinator", nowhere, "nodes", "--coordinator", fake.address).exit_code == 0
    assert baton("--coordinator", fake.address, "nodes", address=nowhere).exit_code == 0
    assert baton("--coordinator", nowhere, "nodes").exit_code == 3


def start(fake: FakeCoordinator, *arguments: str) -> "subprocess.Popen[bytes]":
    """A real process, as a shell would start it."""
    return subprocess.Popen(
        [*BATON, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "BATON_COORDINATOR": fake.address},
    )


@pytest.mark.parametrize(
    ("arguments", "remark"),
    [
        ("logs -f 12", b""),
        (
            "submit --follow -- true",
            b"baton: job 12 submitted\n"
            b"baton: job 12 goes on: baton logs -f 12; baton cancel 12 ends it\n",
        ),
    ],
)
def test_ctrl_c_is_130_and_says_what_goes_on(
    fake: FakeCoordinator, arguments: str, remark: bytes
) -> None:
    fake.answers["Submit"] = [jobs_pb2.SubmitResponse(job_id=12)]
    gone = threading.Event()

    def wait() -> jobs_pb2.StreamLogsResponse:
        gone.wait(DEADLINE_S)
        return jobs_pb2.StreamLogsResponse()

    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    fake.answers["StreamLogs"] = [[jobs_pb2.StreamLogsResponse(data=b"step 1\n"), wait]]
    with start(fake, *arguments.split()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"step 1\n"
            process.send_signal(signal.SIGINT)
            rest, said = process.communicate(timeout=DEADLINE_S)
        finally:
            gone.set()
            process.kill()
    assert (process.returncode, rest, said) == (130, b"", remark)


@pytest.mark.parametrize(("closed", "exit_code"), [("1", 0), ("2", 1)])
def test_closed_streams_are_no_failure(fake: FakeCoordinator, closed: str, exit_code: int) -> None:
    reply = nodes_pb2.ListNodesResponse(nodes=samples.nodes())
    fake.answers["ListNodes"] = [Refusal(grpc.StatusCode.INTERNAL, "no") if exit_code else reply]
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *BATON, "nodes"],
        capture_output=True,
        env={**os.environ, "BATON_COORDINATOR": fake.address},
        timeout=DEADLINE_S,
        check=False,
    )
    assert ended.returncode == exit_code
    assert b"Traceback" not in ended.stderr


def test_a_reader_that_goes_away_is_141_and_quiet(fake: FakeCoordinator) -> None:
    # Much more than a pipe holds, so the writer must meet the closed end.
    part = jobs_pb2.StreamLogsResponse(data=b"x" * 65_536)
    fake.answers["StreamLogs"] = [[part] * 64]
    with start(fake, "logs", "12") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(DEADLINE_S), said) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_no_part_of_an_answer_is_lost_without_a_word(
    fake: FakeCoordinator, unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers: unbuffered, a write that the system ends early is no error to Python."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    node = types_pb2.Node(id="n1", reason="x" * 1_000_000)
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=[node])]
    with start(fake, "nodes", "--json") as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 141


@pytest.mark.parametrize(
    "arguments", ["nodes", "nodes --json", "logs 12", "--help", "nodes --help", "completion bash"]
)
def test_a_full_disk_is_1_and_one_line(fake: FakeCoordinator, arguments: str) -> None:
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=samples.nodes())]
    fake.answers["StreamLogs"] = [[jobs_pb2.StreamLogsResponse(data=b"step 1\n")]]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [*BATON, *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "BATON_COORDINATOR": fake.address},
            timeout=DEADLINE_S,
            check=False,
        )
    said = b"baton: the answer cannot be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (1, said)


def on_terminal(fake: FakeCoordinator, columns: int, *arguments: str, **environment: str) -> str:
    """What a terminal of that width is sent."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*BATON, *arguments],
        stdout=theirs,
        stderr=theirs,
        env={
            **os.environ,
            "BATON_COORDINATOR": fake.address,
            "COLUMNS": str(columns),
            "TERM": "xterm",
            **environment,
        },
    )
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    os.close(ours)
    assert process.wait(DEADLINE_S) == 0
    return shown.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:
        return b""  # how Linux says that the last writer has closed a pseudo-terminal


def test_a_terminal_gets_colour_and_its_width(fake: FakeCoordinator) -> None:
    jobs = [samples.queued_job(), samples.active_job()]
    answer = jobs_pb2.ListJobsResponse(jobs=jobs)
    fake.answers["ListJobs"] = [answer, jobs_pb2.ListJobsResponse()]
    shown = on_terminal(fake, 110, "jobs")
    assert "\x1b[33mqueued" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) == 110
    assert "[red]a name that is lon…" in plain
    assert plain.splitlines()[1].endswith("…")


def test_a_terminal_without_colour_gets_none(fake: FakeCoordinator) -> None:
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    assert "\x1b[32mactive\x1b[0m, on n2" in on_terminal(fake, 110, "job", "12")
    assert "\x1b" not in on_terminal(fake, 110, "job", "12", TERM="dumb")
    assert "\x1b[32m" not in on_terminal(fake, 110, "job", "12", NO_COLOR="1")


@pytest.mark.parametrize("alphabet", ["ascii", "latin-1"])
def test_a_terminal_of_another_alphabet_is_no_failure(fake: FakeCoordinator, alphabet: str) -> None:
    job = types_pb2.Job(id=12, spec=types_pb2.JobSpec(name="日本"))
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse(jobs=[job]), jobs_pb2.ListJobsResponse()]
    assert "??" in on_terminal(fake, 80, "jobs", PYTHONIOENCODING=alphabet)


def test_no_terminal_is_too_narrow_for_an_id(fake: FakeCoordinator) -> None:
    answer = jobs_pb2.ListJobsResponse(jobs=[samples.queued_job()])
    fake.answers["ListJobs"] = [answer, jobs_pb2.ListJobsResponse()]
    assert "1234567890123" in on_terminal(fake, 20, "jobs")
    fake.answers["GetJob"] = [jobs_pb2.GetJobResponse(job=samples.active_job())]
    assert samples.DIGEST in on_terminal(fake, 20, "job", "12")


def test_mutual_tls(baton: Baton, tmp_path: Path) -> None:
    fleet, stranger = Authority(tmp_path / "fleet"), Authority(tmp_path / "stranger")
    ours, theirs = fleet.issue("member").flags(), stranger.issue("member").flags()
    server = fleet.issue("coordinator").server_credentials()
    answers = {"ListNodes": [nodes_pb2.ListNodesResponse()]}
    with FakeCoordinator(answers=answers, credentials=server) as secured:
        assert baton(*ours, "nodes", address=secured.address).exit_code == 0
        assert baton("nodes", *ours, address=secured.address).exit_code == 0
        # A stranger knows the fleet's authority, but has a certificate of another one.
        theirs[-1] = ours[-1]
        assert len(secured.requests) == 2
        for flags in ([], theirs):
            result = baton(*flags, "nodes", address=secured.address)
            assert result.exit_code == 3
            assert result.stderr.startswith("baton: cannot reach the coordinator at ")
        assert len(secured.requests) == 2


def test_whose_certificate_has_expired_is_said(baton: Baton, tmp_path: Path) -> None:
    fleet, over = Authority(tmp_path / "fleet"), -timedelta(minutes=1)
    good, old = fleet.issue("member"), fleet.issue("earlier", left=over)
    server = fleet.issue("coordinator").server_credentials()
    with FakeCoordinator(credentials=server) as secured:
        mine = baton(*old.flags(), "nodes", address=secured.address)
    assert "renew your certificate; see --tls-cert" in mine.stderr
    assert f"({old.cert}, by {old.ca}: certificate has expired)" in mine.stderr
    server = fleet.issue("coordinator", left=over).server_credentials()
    with FakeCoordinator(credentials=server) as secured:
        theirs = baton(*good.flags(), "nodes", address=secured.address)
    assert "the coordinator's certificate, or an authority of it, has expired" in theirs.stderr
    for said in (mine, theirs):
        assert said.exit_code == 3
        assert "SSL_ERROR" not in said.stderr


def test_a_broken_certificate_is_3_and_names_the_options(baton: Baton, tmp_path: Path) -> None:
    fleet = Authority(tmp_path / "fleet")
    flags, server = fleet.issue("member").flags(), fleet.issue("coordinator").server_credentials()
    fleet.path.write_text("not a certificate")
    with FakeCoordinator(credentials=server) as secured:
        result = baton(*flags, "nodes", address=secured.address)
        assert (result.exit_code, secured.requests) == (3, [])
        assert "the TLS handshake failed; see --tls-cert, --tls-key, --tls-ca" in result.stderr


def test_an_argument_that_is_not_text_is_2(baton: Baton, fake: FakeCoordinator) -> None:
    result = baton("submit", "--", "cat", "\udcff.txt")
    assert (result.exit_code, fake.requests) == (2, [])
    assert "is not UTF-8 text" in result.stderr
