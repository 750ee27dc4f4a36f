"""The language of `tests/golden/agent/*.txt`: what a node hears, and what it does about it.

A scenario is read by people first. Lines that begin with `> ` are what happens, one event each;
the indented lines below one are everything that the core answers, in its order: what goes into the
journal, what is sent, what is done. `#` begins a comment.

    > stop 7.1 grace=30000 made room for 9
      journal attempt 7.1: stop_reason='made room for 9' stop_grace_ms=30000
      log info attempt.stopping attempt=7.1 reason='made room for 9'
      tell 7.1 type=stop reason='made room for 9' grace_ms=30000
      signal 7.1 TERM

`restart` is the agent killed and started again: a new core from nothing but the journalled records.
`wait MS` lets time pass, with a tick whenever the core has asked for one.
"""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import fields

from agent.core import messages as m
from agent.core import state as s
from agent.core import trainer_messages as t
from agent.core import values as v
from agent.core.attempt import AttemptRecord
from agent.core.gpu_messages import InspectGpus, PutGpusLeft, Sampled
from agent.core.launch import LaunchOptions
from agent.core.node import NodeCore
from tests.core.agent_memory import MemoryJournal, inspected

UNIX_MS_ZERO = 1_790_000_000_000
HOST = v.HostFacts("box1", "boot1", 8, 64 << 30, "570.1", "0.1.0")
SAMPLE = v.Sample(v.HostSample(0.5, 1 << 30, 1 << 40, 0.7), (v.GpuSample("GPU-a", 0.9),))
TICKS_MAX = 200  # in one `wait`; a core that asks for more of them is spinning


def source(name: str) -> v.ReplicaSource:
    return v.ReplicaSource(name, "" if name == "shared" else f"{name}:7701")


class World:
    """One node's core, its journal, and a clock that moves when told to."""

    def __init__(self) -> None:
        self.journal = MemoryJournal()
        self.shared_directory = ""
        self.gpus: tuple[str, ...] = ("GPU-a", "GPU-b")
        self.now_ms = 0
        self.shown: dict[str, AttemptRecord] = {}
        self.launches: list[v.Launch] = []
        self.core = self._fresh()

    def _fresh(self) -> NodeCore:
        launch = LaunchOptions(
            "n1", "/run/baton/agent.sock", "/state/attempts", "/venv/bin/python",
            (("PATH", "/usr/bin"), ("RANK", "9")),
        )  # fmt: skip
        options = s.Options("n1:7701", launch, self.shared_directory)
        return NodeCore(options, self.journal.memory())

    def run(self, line: str) -> list[str]:
        verb, *words = shlex.split(line)
        plain = [word for word in words if "=" not in word]
        named = dict(word.split("=", 1) for word in words if "=" in word)
        special: dict[str, Callable[[list[str], dict[str, str]], list[str]]] = {
            "wait": self._wait,
            "restart": self._restart,
            "state": self._state,
            "launch": self._launch,
            "node": self._node,
            "stuck": self._stuck,
        }
        if verb in special:
            return special[verb](plain, named)
        event = _event(verb, plain, named, self.gpus)
        return self._handle(event)

    def _handle(self, event: m.Event) -> list[str]:
        effects = self.core.handle(s.Instant(self.now_ms, UNIX_MS_ZERO + self.now_ms), event)
        records = [effect for effect in effects if isinstance(effect, s.Record)]
        assert effects[: len(records)] == records, "records come first"
        self.journal.commit(records)
        lines = []
        for effect in effects:
            if isinstance(effect, InspectGpus):
                # every GPU is clean at once: `tests/core/test_clean.py` has those that are not
                lines += self._handle(inspected(effect))
            else:
                lines.append(self._show(effect))
        return lines

    # --- what is not an event ---------------------------------------------------------------------

    def _node(self, plain: list[str], named: dict[str, str]) -> list[str]:
        """The node's configuration; before the agent is opened."""
        self.shared_directory = named.get("shared", "")
        self.gpus = tuple(filter(None, named.get("gpus", ",".join(self.gpus)).split(",")))
        self.core = self._fresh()
        return []

    def _wait(self, plain: list[str], named: dict[str, str]) -> list[str]:
        until_ms = self.now_ms + int(plain[0])
        lines: list[str] = []
        for _ in range(TICKS_MAX):
            wake_ms = self.core.next_wake_ms()
            if wake_ms is None or wake_ms > until_ms:
                self.now_ms = until_ms
                return lines
            self.now_ms = max(self.now_ms, wake_ms)
            answers = self._handle(m.Tick())
            lines += [f"at {self.now_ms}", *answers] if answers else []
        raise AssertionError(f"more than {TICKS_MAX} ticks: the core spins")

    def _restart(self, plain: list[str], named: dict[str, str]) -> list[str]:
        self.core = self._fresh()
        adopted = tuple(filter(None, named.get("adopted", "").split(",")))
        gpus = tuple(v.GpuFacts(uuid, "NVIDIA H100", 80 << 30) for uuid in self.gpus)
        return self._handle(m.Opened(adopted, HOST, gpus))

    def _state(self, plain: list[str], named: dict[str, str]) -> list[str]:
        state = self.core.state
        lines = [
            f"attempt {live.record.id} {live.record.phase.value}"
            for live in state.attempts.values()
        ]
        spool = ",".join(str(sequence) for sequence in state.spool)
        fences = ",".join(
            f"{fence.job_id}<={fence.epoch}" + f" ranks {_plain(fence.ranks)}" * bool(fence.ranks)
            for fence in state.fences.values()
        )
        return [
            *lines,
            f"spool [{spool}]",
            f"fences [{fences}]",
            f"wake {self.core.next_wake_ms()}",
        ]

    def _stuck(self, plain: list[str], named: dict[str, str]) -> list[str]:
        """Somebody has seen which processes of an attempt do not die."""
        return self._handle(v.ProcessesStuck(plain[0], tuple(int(pid) for pid in plain[1:])))

    def _launch(self, plain: list[str], named: dict[str, str]) -> list[str]:
        """Everything that the process ordered last is started with."""
        launch = self.launches[-1]
        return [
            f"run {shlex.join(launch.arguments)}",
            f"in {launch.working_directory}",
            *(f"{name}={value}" for name, value in launch.environment),
        ]

    # --- showing ----------------------------------------------------------------------------------

    def _show(self, effect: s.Effect) -> str:
        match effect:
            case s.PutAttempt():
                return self._show_record(effect.record)
            case s.DropAttempt():
                return f"journal attempt {effect.attempt}: forgotten"
            case s.SpoolEvent():
                event = effect.event
                return f"journal event {event.sequence} of {event.attempt}: {_words(event.body)}"
            case s.DropSpooled():
                return f"journal events up to {effect.sequence}: acknowledged"
            case m.StartProcess():
                self.launches.append(effect.launch)
                config = f" config={effect.trainer_config_json}" * bool(effect.trainer_config_json)
                return f"start {effect.launch.attempt_id}: {effect.launch.arguments[-1]}{config}"
            case m.Send(message=m.AgentEvent() as event):
                return f"send event {event.sequence}"
            case m.Send():
                return f"send {_words(effect.message)}"
            case m.TellTrainer():
                return f"tell {effect.attempt} {_pairs(effect.message)}"
            case m.Log():
                return f"log {effect.level} {effect.event} {_pairs(effect.fields)}".rstrip()
            case (
                s.PutFence()
                | s.DropFence()
                | s.PutLeaderEpoch()
                | s.PutJournalId()
                | s.PutGpusMended()
                | PutGpusLeft()
            ):
                return f"journal {_words(effect)}"
        return _words(effect)

    def _show_record(self, record: AttemptRecord) -> str:
        """What is new in it; the specification and the token of a new one are left out."""
        before = self.shown.get(record.id)
        self.shown[record.id] = record
        if before is None:
            return f"journal attempt {record.id}: {record.phase.value}"
        changed = [
            (field.name, getattr(record, field.name))
            for field in fields(AttemptRecord)
            if getattr(record, field.name) != getattr(before, field.name)
        ]
        return f"journal attempt {record.id}: {_pairs(changed)}".rstrip()


def _words(value: object) -> str:
    """A value on one line, its type in words: fields that say nothing are left out."""
    kind = "".join(f" {c.lower()}" if c.isupper() else c for c in type(value).__name__).strip()
    names = [field.name for field in fields(value)]  # type: ignore[arg-type]
    pairs = [(name, getattr(value, name)) for name in names]
    return f"{kind} {_pairs(pairs)}".rstrip()


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    return " ".join(
        f"{name}={_plain(value)}"
        for name, value in pairs
        if (value not in (None, "", (), [], 0) and (name, value) != ("parts", 1))
        or (name, value) == ("exit_code", 0)
    )


def _plain(value: object) -> str:
    match value:
        case str():
            return repr(value) if " " in value else value
        case v.ReplicaSource():
            return f"{value.node}@{value.address}"
        case m.HeldAttempt():
            stuck = f"(stuck {_plain(value.stuck)})" if value.stuck else ""
            gain = f"(gains {value.precopy_gain_ms} ms)" if value.precopy_gain_ms else ""
            return f"{value.attempt}{'' if value.live else '(ended)'}{stuck}{gain}"
        case v.GpuFacts() | v.GpuSample():
            return value.uuid
        case v.HostFacts():
            return value.hostname
        case v.HostSample():
            return f"{value.cpu_utilization_ratio:.0%}"
        case m.Progress():
            return f"step {value.step}"
        case v.RestoreCandidate():
            return f"{value.digest}:{value.step}@{_plain(value.sources)}"
        case tuple() | list():
            return "[" + ",".join(_plain(item) for item in value) + "]"
    if hasattr(value, "value"):  # an Enum
        return str(value.value)
    return f"({_words(value)})" if hasattr(value, "__slots__") else str(value)


# --- events -------------------------------------------------------------------------------------


def _event(verb: str, plain: list[str], named: dict[str, str], gpus: tuple[str, ...]) -> m.Event:
    attempt = plain[0] if plain else ""
    rest = " ".join(plain[1:])
    match verb:
        case "open":
            facts = tuple(v.GpuFacts(uuid, "NVIDIA H100", 80 << 30) for uuid in gpus)
            return m.Opened((), HOST, facts)
        case "connect":
            return m.Connected(tuple(plain))
        case "disconnect":
            return m.Disconnected(" ".join(plain) or "cut")
        case "hello":
            return m.FromTrainer(attempt, t.TrainerHello(100))
        case "progress":
            return m.FromTrainer(attempt, t.TrainerProgress(int(rest), None, (("loss", 0.5),)))
        case "milestone":
            said = t.TrainerMilestone(rest, int(named.get("unix_ms", UNIX_MS_ZERO)))
            return m.FromTrainer(attempt, said)
        case "checkpoint":
            path = f"/staging/{named['path']}"
            number, step, parts = (int(named.get(key, 1)) for key in ("id", "step", "parts"))
            return m.FromTrainer(attempt, t.TrainerCheckpoint(number, path, step, parts))
        case "section":
            count, number = int(named.get("count", 1)), int(named.get("source", 1))
            return m.FromTrainer(attempt, t.TrainerSection(number, rest, count))
        case "slab":
            return m.FromTrainer(attempt, t.TrainerSlab(int(named.get("size", 1_000)), 2))
        case "heeds_saves":
            return m.FromTrainer(attempt, t.TrainerHeedsSaves())
        case "capture":
            name = t.capture_name(1, int(named["sequence"]))
            return m.FromTrainer(
                attempt, t.TrainerCheckpoint(int(named["id"]), name, int(named["step"]))
            )
        case "found":
            if "sequence" not in named:
                return m.CaptureFound(attempt)
            name = t.capture_name(1, int(named["sequence"]))
            return m.CaptureFound(attempt, name, int(named["step"]), int(named.get("parts", 1)))
        case "restored":
            skipped = tuple(
                (digest, "is damaged") for digest in filter(None, [named.get("skipped")])
            )
            step = int(named.get("step", 0))
            return m.RestoreDone(attempt, v.Restored(rest, step, f"/restore/{attempt}", skipped))
        case "restore_failed":
            return m.RestoreFailed(attempt, rest)
        case "started":
            return m.ProcessStarted(attempt, int(rest))
        case "start_failed":
            return m.StartFailed(attempt, rest)
        case "exited":
            code, signal = named.get("code"), named.get("signal")
            return m.ProcessEnded(
                v.ProcessExit(attempt, int(code) if code else None, int(signal) if signal else None)
            )
        case "stored":
            size, new = int(named.get("size", 1_000)), int(named.get("new", 10))
            return m.StoreDone(attempt, v.StoredCheckpoint(rest, int(named["step"]), size, new))
        case "store_failed":
            return m.StoreFailed(attempt, rest)
        case "replicated":
            return m.ReplicationDone(attempt, plain[1], plain[2])
        case "replication_failed":
            return m.ReplicationFailed(attempt, plain[1], " ".join(plain[2:]))
        case "sample":
            return Sampled(SAMPLE)
        case "leave":
            return m.Leaving(int(attempt) if attempt else None)
    return m.FromCoordinator(_order(verb, plain, named), "c0ffee")


def _order(verb: str, plain: list[str], named: dict[str, str]) -> m.Order:
    match verb:
        case "welcome":
            acknowledged = int(named.get("acknowledged", 0))
            report_ms = int(named.get("report", 5_000))
            return m.Welcome(
                int(named.get("epoch", 1)), 1_000, 8_000, acknowledged, report_interval_ms=report_ms
            )
        case "renew":
            return m.LeaseRenewal(int(plain[0]))
        case "ack":
            return m.EventAck(int(plain[0]))
        case "keep":
            return m.KeepCheckpoints(tuple(plain))
        case "start":
            return _start(plain, named)
        case "stop":
            grace, precopy = named.get("grace"), named.get("precopy")
            return m.StopAttempt(
                plain[0],
                int(grace) if grace else None,
                " ".join(plain[1:]),
                int(precopy) if precopy else None,
            )
        case "target":
            target = None if plain[1] == "none" else source(plain[1])
            return m.SetReplicaTarget(plain[0], target, "required" in plain)
        case "result":
            accepted, head = plain[2] == "accepted", named.get("head", "")
            return m.CommitResult(plain[0], plain[1], accepted, " ".join(plain[3:]), head)
    raise ValueError(f"unknown verb {verb!r}")


def _start(plain: list[str], named: dict[str, str]) -> m.StartAttempt:
    pairs = [item.split(":") for item in filter(None, named.get("from", "").split(","))]
    candidates = tuple(
        v.RestoreCandidate(digest, int(step), tuple(source(name) for name in names))
        for digest, step, *names in pairs
    )
    trainer = named.get("trainer", "")
    spec = m.JobSpec(
        name="tune",
        command=() if trainer else ("python", "train.py"),
        trainer=trainer,
        trainer_config_json='{"epochs":1}' if trainer else "",
        environment=(("RANK", "7"), ("HF_HOME", "/data/hf")) if "environment" in plain else (),
        working_directory=named.get("in", ""),
        grace_ms=30_000,
        stop_signal=named.get("signal", "TERM"),
        replication=named.get("replication", "automatic"),
        slurm_environment="slurm" in plain,
    )
    return m.StartAttempt(
        plain[0],
        spec,
        tuple(filter(None, named.get("gpus", "GPU-a").split(","))),
        candidates,
        source(named["target"]) if "target" in named else None,
        int(named.get("restarts", 0)),
        _gang(named["gang"], named["gpus"]) if "gang" in named else None,
    )


def _gang(ranks: str, gpus: str) -> v.Gang:
    """`gang=RANK/WORLD:LOCAL/LOCAL_WORLD`, on as many nodes as that makes; here is n1. The GPUs of
    the node's other ranks are called as the first of this one's is, with their local rank."""
    (rank, world), (local, local_world) = (pair.split("/") for pair in ranks.split(":"))
    nodes = int(world) // int(local_world)
    own = gpus.split(",")
    uuids = (f"{own[0][:-1]}{letter}" for letter in "abcdefgh"[: int(local_world) * len(own)])
    return v.Gang(
        int(rank), int(world), int(local), int(local_world), int(rank) // int(local_world),
        tuple(f"n{number + 1}" for number in range(nodes)), "n1.example", 20_123, tuple(uuids),
    )  # fmt: skip
