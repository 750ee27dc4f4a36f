"""What a newcomer meets: a help text with an example for every command, completion, and options on
both levels."""

import json
import subprocess
import sys

import grpc
import pytest
from click.testing import CliRunner

from coordinator.cli.main import cli
from protos.baton.v1 import jobs_pb2, nodes_pb2, types_pb2
from tests.cli import samples
from tests.cli.conftest import Baton
from tests.cli.fake_coordinator import FakeCoordinator, Refusal

COMMANDS = sorted(cli.commands)


def test_the_commands() -> None:
    expected = (
        "submit fit jobs job logs cancel hold release requeue events explain checkpoint "
        "projects cost leases nodes cordon drain uncordon forget telemetry plan scale "
        "simulate forecast completion"
    )
    assert list(cli.commands) == expected.split()


@pytest.mark.parametrize("command", [*COMMANDS, "ps"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_an_example_and_json(command: str, flag: str) -> None:
    result = CliRunner().invoke(cli, [command, flag], prog_name="baton")
    assert result.exit_code == 0
    assert "--json" in result.output
    name = "jobs" if command == "ps" else command
    assert f"\n  baton {name}" in result.output.replace("\n    ", "\n  ") or name == "completion"
    assert name != "completion" or "~/.bashrc" in result.output
    # What is to be copied stays whole.
    lines = [line for line in result.output.splitlines() if " | jq " not in line]
    assert name == "completion" or max(map(len, lines)) <= 80


def test_the_groups_help_names_commands_and_options() -> None:
    shown = CliRunner().invoke(cli, ["--help"], prog_name="baton").output
    assert all(f"\n  {command}" in shown for command in COMMANDS)
    for part in ("--coordinator", "BATON_COORDINATOR", "--tls-ca", "BATON_TLS_CA", "--timeout-s"):
        assert part in shown
    assert "..." not in shown.split("Commands:")[1], "a short help is cut"


@pytest.mark.parametrize(
    ("shell", "part"),
    [("bash", "complete -o nosort"), ("zsh", "#compdef baton"), ("fish", "complete --no-files")],
)
def test_completion_scripts(baton: Baton, shell: str, part: str) -> None:
    result = baton("completion", shell)
    assert result.exit_code == 0
    assert part in result.stdout
    assert "_BATON_COMPLETE" in result.stdout
    document = json.loads(baton("completion", shell, "--json").stdout)
    assert document == {"shell": shell, "script": result.stdout.removesuffix("\n")}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("baton ca", ["plain,cancel"]),
        ("baton submit jo", ["file,jo"]),
        ("baton submit -- cat tr", ["file,tr"]),
        ("baton submit --config lo", ["file,lo"]),
        ("baton submit --workdir da", ["dir,da"]),
        ("baton submit --trainer f", ["plain,finetune"]),
        ("baton submit --class s", ["plain,standard", "plain,spare"]),
        ("baton checkpoint export --python py", ["file,py"]),
    ],
)
def test_completion_completes(typed: str, offered: list[str]) -> None:
    """As zsh and fish were seen to show it, 2026-11-30."""
    assert completed(typed) == offered


def completed(typed: str, address: str = "") -> list[str]:
    """What bash is told, of which the last word is to be completed."""
    asked = {
        "_BATON_COMPLETE": "bash_complete",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
        "BATON_COORDINATOR": address or None,
    }
    result = CliRunner().invoke(cli, [], prog_name="baton", env=asked)
    assert result.exit_code == 0
    return result.output.split()


@pytest.mark.parametrize(
    ("typed", "offered", "phases"),
    [
        ("baton logs ", ["12", "11", "9"], []),
        ("baton explain -- 1", ["12", "11"], []),
        ("baton checkpoint list 9", ["9"], []),
        ("baton cancel 1", ["12", "11"], ["QUEUED", "HELD", "ACTIVE"]),
        ("baton cancel 12 1", ["11"], ["QUEUED", "HELD", "ACTIVE"]),
        ("baton release ", ["12", "11", "9"], ["HELD"]),
        ("baton drain n", ["n1", "n2", "n3", "n4"], None),
        ("baton forget n2", ["n2"], None),
        ("baton jobs --project de", ["demo"], None),
        ("baton submit --project ", ["beta", "demo"], None),
    ],
)
def test_completion_knows_the_fleet(
    fake: FakeCoordinator, typed: str, offered: list[str], phases: list[str] | None
) -> None:
    jobs = [samples.queued_job(), samples.active_job(), samples.ended_job()]
    for job, number in zip(jobs, (12, 11, 9), strict=True):
        job.id = number
    fake.answers["ListJobs"] = [jobs_pb2.ListJobsResponse(jobs=jobs)]
    fake.answers["ListNodes"] = [nodes_pb2.ListNodesResponse(nodes=samples.nodes())]
    fake.answers["ListProjects"] = [
        jobs_pb2.ListProjectsResponse(projects=[jobs_pb2.Project(name=n) for n in ("beta", "demo")])
    ]
    assert completed(typed, fake.address) == [f"plain,{each}" for each in offered]
    if phases is not None:
        asked = [types_pb2.JobPhase.Name(phase) for phase in fake.requests[0].phases]
        assert asked == [f"JOB_PHASE_{phase}" for phase in phases]


def test_completion_of_what_nobody_answers_is_silent(fake: FakeCoordinator) -> None:
    """Neither a sentence between the words that somebody types, nor an error."""
    fake.answers["ListNodes"] = [Refusal(grpc.StatusCode.UNAVAILABLE, "not durable now")]
    assert completed("baton drain n", fake.address) == []
    fake.stop()
    assert completed("baton cancel ", fake.address) == []
    assert completed("baton cancel ", "far.example:7070") == []


def test_help_imports_nothing_heavy() -> None:
    """Starting fast is a property of the import graph; a clock would only measure the machine."""
    script = (
        "import sys; sys.argv = ['baton', '--help']\n"
        "from coordinator.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n"
        "    print(sorted({'grpc', 'rich', 'msgspec', 'google', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
