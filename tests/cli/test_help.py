"""What a newcomer meets: a help text with an example for every command, completion, and options on
both levels."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from coordinator.cli.main import cli
from tests.cli.conftest import Baton

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
    last = str(len(typed.split()) - 1)
    asked = {"_BATON_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": last}
    result = CliRunner().invoke(cli, [], prog_name="baton", env=asked)
    assert result.output.splitlines() == offered


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
