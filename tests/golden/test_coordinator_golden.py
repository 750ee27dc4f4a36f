"""The coordinator's core, scenario by scenario, as text that people read.

Problem: a test that asserts one field says nothing about the ninety others that changed with it.
Each file of `coordinator/` is a script; below every command stand, indented, all the effects that
followed from it, in the core's own words. A change of behaviour shows up as a diff of sentences.

    BATON_GOLDEN=write pytest tests/golden      writes the traces anew; read the diff

The scripts' language, a command a line (`#` begins a comment; values with blanks are quoted):

    at MS | wait MS [beats=n1,n2] | tick | restart | crash COMMAND...
    hello n1 gpus=2xH100:80 journal=j2 runs=1.1 checkpoints=aa memory=256 cpus=8 acknowledged=4
          gangs=no shares=no
    beat n1 [runs=1.1] [at=1.1@20/300,2.1@5] [stuck=1.1@41,42] [gains=1.1.0@900,1.1.1@0]
    closed n1   goodbye n1 [for=30000]
    started 1.1 from=aa@10 skipped=bb   commit 1.1 digest=aa parent= step=10 replicas=n1,n2
                                        [parts=2]
    exit 1.1 code=75 | signal=9 | reason="..."   refused 1.1 reason="..." permanent=yes
    milestone 1.1 name=load             (all of these: node=n2 seq=7 to speak out of turn)
    verdict n1-g0 node=n1 is=needs_reset reason="needs a reset (xid 95)"
    submit gpus=1 class=spare type=H100 gpumemory=80 memory=64 name=x hold=yes replication=required
           restarts=3 grace=120000 request=r1 command="python train.py" trainer= project=
           keep=2 ranks=4 share=8 pays=yes steps=900 config='{"model": "m"}'
           deadline=3600 (seconds after the script's begin) array=0-5%2
    cancel 1   hold 1   release 1   requeue 1 [abandon=yes]   (each: array=yes, all of it)
    explain 1   job 1   jobs [fold=yes]
    checkpoints 1   pin 1 [digest=aaaaaa] [step=10]   unpin 1 [step=10]
    cordon n1   drain n1   uncordon n1   nodes
    quotas demo=48 beta=24             (a restart with these, in weighted GPU-hours a day)
    projects

`wait` lets time pass in ticks of half a second while every connected node, or those named, sends
its heartbeats. A node's list of what it runs follows from `started` and `exit` unless `runs` says
otherwise; `runs=-` is an empty one, and `1.1!` has ended without its end being acknowledged.
"""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from coordinator.core.checkpoint_requests import (
    CheckpointChoice,
    ListCheckpoints,
    PinCheckpoint,
    UnpinCheckpoint,
)
from coordinator.core.messages import (
    AgentEvent,
    AgentEventBody,
    AgentMessage,
    AttemptExited,
    AttemptMilestone,
    AttemptRefused,
    AttemptStarted,
    CancelJob,
    CheckpointProposed,
    CordonNode,
    DrainNode,
    Effect,
    Event,
    ExplainJob,
    FromAgent,
    GetJob,
    Goodbye,
    GpuHealthChanged,
    Heartbeat,
    HeldAttempt,
    Hello,
    HoldJob,
    ListJobs,
    ListNodes,
    ReleaseJob,
    Request,
    RequestBody,
    RequeueJob,
    SessionClosed,
    Submit,
    Tick,
    UncordonNode,
)
from coordinator.core.model import (
    GpuFacts,
    GpuHealth,
    GpuVerdict,
    HostFacts,
    JobClass,
    JobSpec,
    Progress,
    Replication,
)
from coordinator.core.project_requests import ListProjects
from coordinator.core.quotas import Quota
from tests.core.coordinator_harness import (
    GIGABYTE,
    UNIX_MS_AT_START,
    Rig,
    gpus_of,
    trace,
)

SCENARIOS = sorted((Path(__file__).parent / "coordinator").glob("*.txt"))
WRITE = os.environ.get("BATON_GOLDEN") == "write"
TICK_MS = 500
BEAT_MS = 1_000

_BOX = HostFacts("box", "", 8, 256 * GIGABYTE)

Words = dict[str, str]


@dataclass
class Speaker:
    """A node as the script has it."""

    session: int = 0
    connected: bool = False
    journal: str = "j1"
    sequence: int = 0
    heartbeats: int = 0
    gpus: tuple[GpuFacts, ...] = ()
    host: HostFacts = _BOX
    runs: dict[str, None] = field(default_factory=dict)


class Scenario:
    """Runs a script's commands against one rig."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.speakers: dict[str, Speaker] = {}
        self.sessions = 0

    def run(self, line: str) -> list[Effect]:
        verb, *rest = shlex.split(line, comments=True)
        if verb == "crash":
            event = self._event(rest[0], *_arguments(rest[1:]))
            self.rig.crash_on(event)
            self._disconnect_all()
            return []
        names, words = _arguments(rest)
        if verb == "at":
            self.rig.now_ms = int(names[0])
            return []
        if verb == "quotas":
            quotas = {name: Quota(float(hours)) for name, hours in words.items()}
            self.rig.options = replace(self.rig.options, projects=quotas)
            self.rig.restart()
            return []
        if verb == "wait":
            return self._wait(int(names[0]), words.get("beats"))
        if verb == "restart":
            self.rig.restart()
            self._disconnect_all()
            return self.rig.handle(Tick())
        return self.rig.handle(self._event(verb, names, words))

    def _disconnect_all(self) -> None:
        for speaker in self.speakers.values():
            speaker.connected = False

    def _wait(self, duration_ms: int, beats: str | None) -> list[Effect]:
        effects: list[Effect] = []
        for passed_ms in range(TICK_MS, duration_ms + 1, TICK_MS):
            self.rig.now_ms += TICK_MS
            for name, speaker in self.speakers.items():
                named = beats is None or name in beats.split(",")
                if passed_ms % BEAT_MS == 0 and speaker.connected and named:
                    effects += self.rig.handle(self._event("beat", [name], {}))
            effects += self.rig.handle(Tick())
        return effects

    def _event(self, verb: str, names: list[str], words: Words) -> Event:
        if verb == "tick":
            return Tick()
        if verb in _REQUESTS:
            return Request(1, _REQUESTS[verb](names[0] if names else "", words))
        if verb in _EVENTS:
            words = {"gpu": names[0], **words} if verb == "verdict" else words
            return self._agent_event(_EVENTS[verb](words), verb, names[0], words)
        assert verb in ("hello", "beat", "closed", "goodbye"), f"unknown command {verb!r}"
        speaker = self.speakers.setdefault(names[0], Speaker())
        message: AgentMessage
        if verb == "hello":
            message = self._hello(names[0], speaker, words)
        elif verb == "beat":
            speaker.heartbeats += 1
            message = Heartbeat(
                speaker.heartbeats, attempts=self._held(speaker, words), progress=_said(words)
            )
        elif verb == "goodbye":
            speaker.connected = False
            message = Goodbye(int(words["for"]) if "for" in words else None)
        else:
            speaker.connected = False
            message = SessionClosed()
        return FromAgent(int(words.get("session", speaker.session)), message)

    def _hello(self, name: str, speaker: Speaker, words: Words) -> Hello:
        if words.get("journal", speaker.journal) != speaker.journal:
            speaker.journal, speaker.sequence, speaker.runs = words["journal"], 0, {}
        self.sessions += 1
        speaker.session, speaker.heartbeats, speaker.connected = self.sessions, 0, True
        if "gpus" in words:
            speaker.gpus = gpus_of(name, words["gpus"])
        if "memory" in words or "cpus" in words:
            memory_bytes = int(words.get("memory", 256)) * GIGABYTE
            speaker.host = HostFacts("box", "", int(words.get("cpus", 8)), memory_bytes)
        if "version" in words:
            speaker.host = replace(speaker.host, agent_version=words["version"])
        return Hello(
            name, speaker.journal, f"{name}:7001", speaker.host, speaker.gpus,
            self._held(speaker, words), _listed(words.get("checkpoints", "")),
            int(words.get("acknowledged", 0)), gangs=words.get("gangs") != "no",
            shares=words.get("shares") != "no",
        )  # fmt: skip

    def _held(self, speaker: Speaker, words: Words) -> tuple[HeldAttempt, ...]:
        if "runs" in words:
            speaker.runs = dict.fromkeys(_listed(words["runs"].replace("-", "")))
        attempts = self.rig.disk.attempts
        owner, _, listed = words.get("stuck", "").partition("@")
        stuck = tuple(int(pid) for pid in _listed(listed))
        gains = dict(item.split("@") for item in _listed(words.get("gains", "")))
        held = []
        for run in speaker.runs:
            attempt = attempts.get(run.rstrip("!"))
            gpu_uuids = attempt.gpu_uuids if attempt is not None else ()
            pids = stuck if run == owner else ()
            gain_ms = int(gains[run]) if run in gains else None
            run_id, lives = run.rstrip("!"), not run.endswith("!")
            held.append(HeldAttempt(run_id, gpu_uuids, lives, pids, gain_ms))
        return tuple(held)

    def _agent_event(
        self, body: AgentEventBody, verb: str, attempt: str, words: Words
    ) -> FromAgent:
        name = words.get("node") or self.rig.disk.attempts[attempt].node
        speaker = self.speakers[name]
        if verb == "started":
            speaker.runs[attempt] = None
        elif verb in ("exit", "refused"):
            speaker.runs.pop(attempt, None)
        if "seq" not in words:
            speaker.sequence += 1
        sequence = int(words.get("seq", speaker.sequence))
        unix_ms = UNIX_MS_AT_START + self.rig.now_ms
        return FromAgent(speaker.session, AgentEvent(sequence, unix_ms, attempt, body))


def _arguments(rest: list[str]) -> tuple[list[str], Words]:
    pairs = [word.partition("=") for word in rest]
    return [name for name, equals, _ in pairs if not equals], {
        name: value for name, equals, value in pairs if equals
    }


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _spec(words: Words) -> JobSpec:
    command = words.get("command", "" if "trainer" in words else "train")
    return JobSpec(
        name=words.get("name", ""),
        project=words.get("project", "default"),
        job_class=JobClass(words.get("class", "standard")),
        command=tuple(command.split()),
        trainer=words.get("trainer", ""),
        trainer_config_json=_configuration(words),
        working_directory=words.get("directory", ""),
        environment=tuple((name, "x") for name in _listed(words.get("environment", ""))),
        gpus=int(words.get("gpus", 0)),
        gpu_types=_listed(words.get("type", "")),
        gpu_memory_bytes_min=int(words.get("gpumemory", 0)) * GIGABYTE,
        memory_bytes=int(words.get("memory", 0)) * GIGABYTE,
        grace_ms=int(words.get("grace", 120_000)),
        max_restarts=int(words.get("restarts", 3)),
        replication=Replication(words.get("replication", "automatic")),
        hold="hold" in words,
        keep_checkpoints=int(words.get("keep", 3)),
        ranks=int(words.get("ranks", 1)),
        shared_gpu_memory_bytes=int(words.get("share", 0)) * GIGABYTE,
        deadline_unix_ms=_deadline(words),
        share_automatic="pays" in words,
        array=words.get("array", ""),
    )


def _deadline(words: Words) -> int:
    return UNIX_MS_AT_START + 1_000 * int(words["deadline"]) if "deadline" in words else 0


def _configuration(words: Words) -> str:
    """Trainings of one model, which differ in nothing but how long they are."""
    if "steps" in words:
        return json.dumps({"model": "m", "train_data": "d", "steps": int(words["steps"])})
    return words.get("config", "")


def _choice(words: Words) -> CheckpointChoice:
    return CheckpointChoice(
        words.get("digest", ""), int(words["step"]) if "step" in words else None
    )


def _said(words: Words) -> tuple[tuple[str, Progress], ...]:
    said = [item.partition("@") for item in _listed(words.get("at", ""))]
    told = [(attempt, *step.partition("/")[::2]) for attempt, _, step in said]
    return tuple((attempt, Progress(int(step), int(total or 0))) for attempt, step, total in told)


def _started(words: Words) -> AttemptStarted:
    digest, _, step = words.get("from", "").partition("@")
    skipped = tuple((bad, "chunk 0 does not verify") for bad in _listed(words.get("skipped", "")))
    return AttemptStarted(100, digest, int(step or 0), skipped)


def _proposed(words: Words) -> CheckpointProposed:
    return CheckpointProposed(
        words["digest"], words.get("parent", ""), int(words["step"]), GIGABYTE,
        _listed(words["replicas"]), int(words.get("parts", 0)),
    )  # fmt: skip


def _exited(words: Words) -> AttemptExited:
    code = int(words["code"]) if "code" in words else None
    signal = int(words["signal"]) if "signal" in words else None
    said = int(words["said"]) if "said" in words else None
    return AttemptExited(code, signal, words.get("reason", ""), said_exit_code=said)


_REQUESTS: dict[str, Callable[[str, Words], RequestBody]] = {
    "submit": lambda _, words: Submit(_spec(words), words.get("request", "")),
    "cancel": lambda name, words: CancelJob(int(name), "array" in words),
    "hold": lambda name, words: HoldJob(int(name), "array" in words),
    "release": lambda name, words: ReleaseJob(int(name), "array" in words),
    "requeue": lambda name, words: RequeueJob(int(name), "abandon" in words, "array" in words),
    "explain": lambda name, _: ExplainJob(int(name)),
    "job": lambda name, _: GetJob(int(name)),
    "jobs": lambda _, words: ListJobs(
        page_size=int(words.get("size", 0)),
        before_job_id=int(words.get("before", 0)),
        fold_arrays="fold" in words,
    ),
    "checkpoints": lambda name, _: ListCheckpoints(int(name)),
    "pin": lambda name, words: PinCheckpoint(int(name), _choice(words)),
    "unpin": lambda name, words: UnpinCheckpoint(int(name), _choice(words) if words else None),
    "nodes": lambda _, __: ListNodes(),
    "projects": lambda _, __: ListProjects(),
    "cordon": lambda name, _: CordonNode(name),
    "drain": lambda name, _: DrainNode(name),
    "uncordon": lambda name, _: UncordonNode(name),
}

_EVENTS: dict[str, Callable[[Words], AgentEventBody]] = {
    "started": _started,
    "commit": _proposed,
    "exit": _exited,
    "refused": lambda words: AttemptRefused(words["reason"], "permanent" in words),
    "verdict": lambda words: GpuHealthChanged(
        (GpuHealth(words["gpu"], GpuVerdict(words["is"]), words.get("reason", "")),)
    ),
    "milestone": lambda words: AttemptMilestone(words["name"]),
}


def play(script: str) -> str:
    """The script with the trace of each command below it; old traces are replaced."""
    scenario = Scenario()
    lines: list[str] = []
    for line in script.splitlines():
        if line.startswith("  "):
            continue
        lines.append(line)
        if line.strip() and not line.startswith("#"):
            lines += [f"  {text}" for text in trace(scenario.run(line))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_trace_is_as_written(path: Path) -> None:
    script = path.read_text()
    played = play(script)
    if WRITE:
        path.write_text(played)
        return
    assert played == script


def test_the_scenarios_are_there() -> None:
    """An empty folder would pass every test above."""
    assert len(SCENARIOS) >= 10


def test_a_changed_trace_is_noticed() -> None:
    played = play("submit gpus=1\n")
    assert played != play(played.replace("gpus=1", "gpus=2"))
    assert play(played.replace("queued", "active")) == played
