"""All that needs a card, in one command; the head of the package has the order.

Problem: whoever has a card has it for half an hour, and alone. A script that fails or hangs must
not take the others with it, and what was measured must be on disk when the machine goes. So each
script is a process of its own with a limit; the section is written after each; and a failure is a
line of the table, with the last that was said.

Exit status: 0 when all has run and held, 1 when something has not, 3 without a device.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import report
from bench.gpu import EXIT_NO_DEVICE

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / ".bench"
SECTION = "gpu.md"
LIMIT_S = 540.0  # of one script, as machines are lent that end a command after ten minutes
CARD_LIMIT_S = 120.0  # a driver without persistence mode initialises each card first
SAID_LINES = 3  # of the end of a script that failed


@dataclass(frozen=True, slots=True)
class Script:
    """``words`` follow the interpreter; ``quick`` is added to them where less is wanted. Of one
    with ``rows`` the output is JSON."""

    name: str
    words: tuple[str, ...]
    quick: tuple[str, ...] = ()
    rows: bool = False


TESTS = "-m pytest -m gpu -q -n 0 -rfE tests/agent tests/trainers"
SCRIPTS = (
    Script("tests", tuple(TESTS.split())),
    Script("prefetch", ("-m", "bench.gpu.prefetch", "--json"), ("--quick",), rows=True),
    Script("checkpoint", ("-m", "bench.gpu.checkpoint", "--json"), ("--quick",), rows=True),
    Script("demo", ("-m", "tests.e2e.demo"), ("--no-comparison",)),
)


@dataclass(slots=True)
class Ran:
    """A script that has come to its end, one way or the other."""

    name: str
    verdict: str
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    said: str = ""
    """Its last lines."""

    @property
    def held(self) -> bool:
        return self.verdict == "ok"


def main(arguments: Sequence[str]) -> int:
    chosen = _parser().parse_args(arguments)
    status, card = ask_card()
    report.say(card)
    if status:
        return status
    chosen.out.mkdir(parents=True, exist_ok=True)
    ran: list[Ran] = []
    text = ""
    for script in SCRIPTS:
        if chosen.only and script.name not in chosen.only:
            continue
        report.say(f"{script.name}: at most {chosen.limit_s / 60:.0f} minutes")
        ran.append(run(script, chosen.out, quick=chosen.quick, limit_s=chosen.limit_s))
        report.say(f"{script.name}: {ran[-1].verdict}, {ran[-1].seconds:.0f} s")
        text = section(card, datetime.now(UTC), ran)
        (chosen.out / SECTION).write_text(text, encoding="utf-8")
    print(json.dumps([row for one in ran for row in one.rows]) if chosen.json else text)
    report.say(f"this section, and what each script has said: {chosen.out}")
    return 0 if all(one.held for one in ran) else 1


def ask_card() -> tuple[int, str]:
    """In a process of its own: one that has asked for a device holds some of its memory. An exit
    status, 0 where there is a card, and what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.card"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=CARD_LIMIT_S,
    )
    said = (done.stdout or done.stderr).strip().splitlines()
    text = said[-1] if said else f"bench.gpu.card ended with {done.returncode}"
    return (done.returncode if done.returncode in (0, EXIT_NO_DEVICE) else 1), text


def run(script: Script, directory: Path, *, quick: bool, limit_s: float) -> Ran:
    """Its output goes into a file, and to the terminal nothing: it may be long."""
    words = [sys.executable, "-u", *script.words, *(script.quick if quick else ())]
    output, errors = directory / f"{script.name}.out", directory / f"{script.name}.err"
    began_s = time.monotonic()
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,  # what hangs is ended with all that it has started
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
            verdict = "ok" if status == 0 else f"ended with {status}"
        except subprocess.TimeoutExpired:
            verdict = f"not done in {limit_s:.0f} s"
        finally:
            end(process)
    ran = Ran(script.name, verdict, time.monotonic() - began_s)
    text = output.read_text("utf-8", "replace")
    lines = [*text.splitlines(), *errors.read_text("utf-8", "replace").splitlines()]
    ran.said = "\n".join(lines[-SAID_LINES:])
    if script.rows and ran.held:
        try:
            ran.rows = json.loads((text.splitlines() or [""])[-1])  # libraries may talk before
        except ValueError:
            ran.verdict = "its rows are not JSON"
    return ran


def environment() -> dict[str, str]:
    """Ours, with the checkout's packages in front: the interpreter need not have them installed."""
    paths = [str(ROOT), str(ROOT / "trainers" / "sdk"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": ":".join(path for path in paths if path)}


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and its group; nothing where it has ended. Ctrl-C comes here as well."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def section(card: str, now: datetime, ran: Sequence[Ran]) -> str:
    """Markdown: where and when, what ran, and all figures."""
    lines = [
        f"## On a card, {now:%Y-%m-%d}",
        "",
        f"`python -m bench.gpu`, {now:%H:%M} UTC. {card}. {report.machine()}.",
        "",
        "| script | verdict | seconds |",
        "|---|---|---|",
        *(f"| {one.name} | {_cell(one.verdict)} | {one.seconds:.0f} |" for one in ran),
    ]
    for one in ran:
        if one.rows:
            lines += ["", f"### {one.name}", "", *table(one.rows)]
        elif one.said:
            lines += ["", f"### {one.name}", "", "```", one.said, "```"]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as `report.show` prints them in JSON; the spread goes beside its median."""
    ends = ("lowest", "highest")
    values = {row["name"]: row["value"] for row in rows}
    lines = ["| figure | median (spread) | unit | goal | reference | times better |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        name = row["name"]
        if name.rpartition(", ")[2] in ends and name.rpartition(", ")[0] in values:
            continue
        spread = [report.number(values[f"{name}, {which}"]) for which in ends
                  if f"{name}, {which}" in values]  # fmt: skip
        goal = "" if row["goal"] is None else report.number(row["goal"])
        goal += {None: "", True: ", met", False: ", **missed**"}[row["met"]]
        reference = row["reference"]
        cells = (
            name,
            report.number(row["value"]) + (f" ({' to '.join(spread)})" if spread else ""),
            row["unit"],
            goal,
            "" if reference is None else f"{report.number(reference)}, {row['reference_source']}",
            "" if row["ratio"] is None else report.number(row["ratio"]),
        )
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=[one.name for one in SCRIPTS], help="these, in their order"
    )
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="where results go (.bench)")
    parser.add_argument(
        "--limit-s", type=float, default=LIMIT_S, help="seconds for each script (540)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
