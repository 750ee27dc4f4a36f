"""The examples of docs/events.md, asked of a real systemd-journald that a real program logs to.

It has a /run and a /var/log of its own, in a mount namespace, and is a journal namespace, which
leaves the kernel's log alone; the machine's own journal is not touched. That needs root.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.events import EVENTS
from coordinator.journald import message_id

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e-journalctl")]

JOURNALD = "/lib/systemd/systemd-journald"
DEADLINE_S = 60
# $1: a directory; then the program. What journald has written is copied there in the end.
SCRIPT = """
set -eu
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
directory="$1"; shift
mount -t tmpfs none /run
mount -t tmpfs none /var/log
mkdir /var/log/journal
mkdir -p /run/systemd/journal.baton-test
ln -s journal.baton-test /run/systemd/journal
"$JOURNALD" baton-test & journald=$!
until [ -S /run/systemd/journal/socket ]; do kill -0 $journald; sleep 0.05; done
: > "$directory/stderr"
export JOURNAL_STREAM="$(stat -c %d:%i "$directory/stderr")"
"$@" 2>> "$directory/stderr" & program=$!
until [ -s "$directory/port" ]; do kill -0 $program; sleep 0.05; done
kill $program
wait $program
kill $journald
wait $journald
cp -r /var/log/journal/*.baton-test "$directory/journal"
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `journal` holds what a coordinator logged from its start to its end."""
    programs = (JOURNALD, "unshare", "journalctl")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing or os.geteuid() != 0 or not Path("/etc/machine-id").exists():
        pytest.skip(f"needs root, a machine id and {', '.join(programs)}")
    made = tmp_path_factory.mktemp("journal")
    program = [
        sys.executable, "-P", "-m", "coordinator", "--listen", "127.0.0.1:0",
        "--state-directory", str(made / "state"), "--port-file", str(made / "port"),
    ]  # fmt: skip
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "bash",
            "-c",
            SCRIPT,
            "-",
            made,
            *program,
        ],
        env={**os.environ, "JOURNALD": JOURNALD},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if "permission denied" in done.stderr.lower() or "not permitted" in done.stderr.lower():
        pytest.skip(f"a mount namespace cannot be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return made


def journalctl(directory: Path, *words: str) -> list[str]:
    done = subprocess.run(
        ["journalctl", "--quiet", "--no-pager", "--directory", directory / "journal", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_sentence_is_the_message(directory: Path) -> None:
    (line,) = journalctl(directory, "BATON_EVENT=coordinator.stopped", "--output=cat")
    assert line == EVENTS["coordinator.stopped"].msg


def test_a_kind_of_event_is_found_by_its_id(directory: Path) -> None:
    (found,) = journalctl(
        directory, f"MESSAGE_ID={message_id('coordinator.started')}", "--output=json"
    )
    entry = json.loads(found)
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("6", "baton-coordinator")
    assert entry["BATON_EVENT"] == "coordinator.started"


def test_which_events_there_were(directory: Path) -> None:
    events = set(journalctl(directory, "--field=BATON_EVENT"))
    assert {"coordinator.started", "coordinator.stopped"} <= events <= set(EVENTS)


def test_nothing_is_lost_and_nothing_went_to_stderr(directory: Path) -> None:
    entries = journalctl(directory, "--output=json", "--output-fields=BATON_LINE,BATON_SEQ")
    found = [json.loads(entry) for entry in entries]
    lines = [json.loads(one["BATON_LINE"]) for one in found if "BATON_LINE" in one]
    assert lines
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert (directory / "stderr").read_bytes() == b""
