"""What the demo concludes: the timeline around the kill, its phases, and whether everything held.

All times come from Baton's own history (`baton events --json`): an attempt's start and its
milestones carry the stamp of the agent that saw them, decisions that of the coordinator. Only the
kill is ours. Everything here is on one machine, so the stamps share a clock.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

BAR_CELLS = 30


class ReportError(Exception):
    """The history does not tell of a handoff; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Moment:
    """`seconds` are relative to the kill."""

    name: str
    seconds: float
    what: str


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the recovery time, from one moment to the next."""

    name: str
    seconds: float
    what: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job's figure that counts, before its first step and at its end."""

    metric: str
    at_start: float
    value: float


def parse_time(text: str) -> float:
    """RFC 3339 to seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def timeline(events: Sequence[dict[str, Any]], killed_s: float, node: str) -> list[Moment]:
    """The moments that matter in a job's history. Raises `ReportError`."""
    lost = next((e for e in events if e["name"] == "attempt.unreachable"), None)
    if lost is None:
        raise ReportError(f"the coordinator never noticed that {node} was gone")
    index = events.index(lost)
    before, after = events[:index], events[index:]

    def first(among: Sequence[dict[str, Any]], name: str, message: str = "") -> dict[str, Any]:
        for event in among:
            if event["name"] == name and message in ("", event["message"]):
                return event
        raise ReportError(f"the history has no {message or name}")

    assigned = first(after, "attempt.assigned")
    started = first(after, "attempt.started")
    found = [
        ("submitted", first(before, "job.submitted"), ""),
        ("running", first(before, "attempt.started"), f"on {node}"),
        ("detected", lost, lost["message"]),
        ("reassigned", assigned, assigned["message"]),
        ("process started", started, started["message"]),
        ("imports", first(after, "attempt.milestone", "imports"), "torch and transformers"),
        ("load", first(after, "attempt.milestone", "load"), "model, data and checkpoint"),
        ("first new step", first(after, "attempt.milestone", "first_step"), ""),
        ("finished", first(after, "job.succeeded"), f"on {assigned['node']}"),
    ]
    moments = [Moment(name, parse_time(e["time"]) - killed_s, what) for name, e, what in found]
    return [*moments[:2], Moment("killed", 0.0, node), *moments[2:]]


def phases(moments: Sequence[Moment]) -> list[Phase]:
    """The recovery, from the kill to the first new step, in parts that add up to it."""
    at = {moment.name: moment.seconds for moment in moments}
    parts = (
        ("detection", "killed", "detected", "the coordinator waits for a sign of life"),
        ("decision", "detected", "reassigned", "where it goes"),
        ("start", "reassigned", "process started", "made durable, checkpoint fetched, verified"),
        ("imports", "process started", "imports", "Python, torch, transformers"),
        ("load", "imports", "load", "model, data and checkpoint into memory"),
        ("first step", "load", "first new step", ""),
    )
    return [Phase(name, at[end] - at[begin], what) for name, begin, end, what in parts]


def read_outcome(log: str) -> Outcome:
    """From the line that a built-in trainer writes last. Raises `ReportError`."""
    for line in reversed(log.splitlines()):
        if '"finished"' not in line:
            continue
        values = json.loads(line)
        metric = values["metric"]
        return Outcome(metric, values[f"{metric}_at_start"], values["value"])
    raise ReportError("the log has no line that says how training finished")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that the demo found out."""

    killed_node: str
    resumed_on: str
    moments: tuple[Moment, ...]
    phases: tuple[Phase, ...]
    last_step_before_kill: int
    restored_step: int
    total_steps: int
    finetune: Outcome
    transfer: Outcome

    @property
    def recovery_s(self) -> float:
        """From the kill to the first new step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def dominant(self) -> Phase:
        """The longest part of the recovery."""
        return max(self.phases, key=lambda phase: phase.seconds)

    @property
    def repeated_steps(self) -> int:
        """Done before the kill, after the last committed checkpoint."""
        return max(0, self.last_step_before_kill - self.restored_step)

    def failures(self) -> list[str]:
        """What did not hold, as sentences."""
        found = []
        if self.resumed_on == self.killed_node:
            found.append(f"the job came back on {self.killed_node}, which was dead")
        if self.restored_step <= 0:
            found.append("the job began again from nothing")
        if self.finetune.value >= self.finetune.at_start:
            found.append(f"fine-tuning did not improve {self.finetune.metric}")
        if self.transfer.value <= self.transfer.at_start:
            found.append(f"transfer learning did not improve {self.transfer.metric}")
        return found

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **asdict(self),
            "recovery_s": self.recovery_s,
            "dominant": self.dominant.name,
            "repeated_steps": self.repeated_steps,
            "failures": self.failures(),
        }


def lines(summary: Summary) -> list[str]:
    """For people."""
    out = ["Timeline of the fine-tuning job (seconds from the kill)"]
    for moment in summary.moments:
        out.append(f"  {moment.seconds:+9.2f}  {moment.name:<16} {moment.what}".rstrip())
    total_s = summary.recovery_s
    out += ["", f"Recovery: {total_s:.2f} s from the kill to the first new step"]
    for phase in summary.phases:
        bar = "#" * round(phase.seconds / total_s * BAR_CELLS)
        line = f"  {phase.name:<11}{phase.seconds:8.2f} s  {bar:<{BAR_CELLS}}  {phase.what}"
        out.append(line.rstrip())
    share = summary.dominant.seconds / total_s
    out.append(f"  What dominates: {summary.dominant.name}, {share:.0%} of it.")
    done, restored = summary.last_step_before_kill, summary.restored_step
    out += [
        "",
        "Result",
        f"  moved            {summary.killed_node} -> {summary.resumed_on}",
        f"  steps repeated   {summary.repeated_steps} of {summary.total_steps} (the last reported "
        f"was {done}, the last committed {restored})",
        f"  fine-tuning      {_outcome(summary.finetune, '.2f')}",
        f"  transfer         {_outcome(summary.transfer, '.1%')}",
    ]
    return out


def _outcome(outcome: Outcome, form: str) -> str:
    metric = outcome.metric.replace("_", " ")
    return f"{metric} {outcome.at_start:{form}} -> {outcome.value:{form}}"
