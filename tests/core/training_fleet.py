"""A fleet that trains: the real core, honest nodes, and hours of virtual time.

Problem: what a decision over all jobs does shows after minutes of training at a known speed, from
checkpoints that were committed meanwhile. So here everybody starts when told, makes steps, saves
every ten seconds, and leaves when asked to; a test says who comes, who ends, and how time passes.
"""

import json
from dataclasses import replace

from coordinator.core import messages as m
from coordinator.core.gpu_types import key_of
from coordinator.core.model import HostFacts, Job, JobSpec, Progress, TrainerTime
from coordinator.core.phases import AttemptPhase, JobPhase
from coordinator.core.state import Options, State
from tests.core.coordinator_harness import GIGABYTE, Rig, gpus_of

H100, A100 = "H100", "A100 80GB"
SAVE_MS = 10_000
TRAINS = (AttemptPhase.RUNNING, AttemptPhase.STOPPING)
HOST = HostFacts("box", "", 8, 256 * GIGABYTE)


class Fleet:
    """Nodes that do what they are told, and trainers that make a step a second on H100, `slow`
    times that elsewhere, and `kept` times it beside others."""

    def __init__(
        self, *gpus: str, options: Options | None = None, slow: float = 0.4, kept: float = 0.9
    ) -> None:
        self.rig = Rig(options or Options())
        self.slow = slow
        self.kept = kept
        self.beats = 0
        self.tick_ms = 500
        self.steps: dict[str, float] = {}
        self.totals: dict[int, int] = {}
        for session, text in enumerate(gpus, start=1):
            name = f"n{session}"
            hello = m.Hello(name, f"{name}-1", f"{name}:1", HOST, gpus_of(name, text), ())
            self.rig.handle(m.FromAgent(session, hello))

    @property
    def state(self) -> State:
        return self.rig.core.state

    def submit(self, spec: JobSpec | None = None, total: int = 0, **asks: object) -> int:
        """A job, or an array, whose first one is returned; with `total` it says how many steps it
        has."""
        spec = spec or JobSpec(command=("train",), gpus=1)
        spec = replace(spec, **asks)  # type: ignore[arg-type]
        job_id = self.state.last_job_id + 1
        self.rig.handle(m.Request(1, m.Submit(spec)))
        made = range(job_id, self.state.last_job_id + 1)
        self.totals.update(dict.fromkeys(made, total))
        self.run(0)
        return job_id

    def run(self, seconds: int, saving: bool = True) -> None:
        """Everybody starts, trains, and leaves when asked to; a checkpoint of each every ten
        seconds."""
        for number in range(max(1, seconds * 1_000 // self.tick_ms)):
            self.obey()
            if seconds:
                self.rig.now_ms += self.tick_ms
            due = (number + 1) * self.tick_ms % SAVE_MS == 0
            self.train(self.tick_ms / 1_000 if seconds else 0.0, saving and due)
            self.rig.handle(m.Tick())
        self.obey()

    def obey(self) -> None:
        for attempt in list(self.state.attempts.values()):
            if attempt.phase is AttemptPhase.ASSIGNED:
                head = self.state.jobs[attempt.job_id]
                self.say(attempt.id, m.AttemptStarted(1, head.head, head.head_step, start_ms=0))
                self.steps[attempt.id] = float(head.head_step)
            elif attempt.phase is AttemptPhase.STOPPING:
                self.save(attempt.id)
                self.say(attempt.id, m.AttemptExited(75))

    def train(self, seconds: float, save: bool) -> None:
        said: dict[str, list[tuple[str, Progress]]] = {name: [] for name in self.state.nodes}
        for attempt in self.state.attempts.values():
            if attempt.phase is not AttemptPhase.RUNNING:
                continue
            gpus = self.state.nodes[attempt.node].gpus
            fast = all(gpus[uuid].facts.name == H100 for uuid in attempt.gpu_uuids)
            beside = any(len(gpus[uuid].holders) > 1 for uuid in attempt.gpu_uuids)
            speed = (1.0 if fast else self.slow) * (self.kept if beside else 1.0)
            self.steps[attempt.id] += seconds * speed
            spent = TrainerTime(step_s=(self.rig.now.unix_ms - attempt.assigned_unix_ms) / 1000)
            total = self.totals[attempt.job_id]
            told = Progress(int(self.steps[attempt.id]), total, time=spent)
            said[attempt.node].append((attempt.id, told))
            if save:
                self.save(attempt.id)
        for name, live in self.state.nodes.items():
            held = tuple(
                m.HeldAttempt(one, self.state.attempts[one].gpu_uuids) for one in live.attempts
            )
            if live.session is None:  # it was ordered, and has not come
                continue
            self.beats += 1
            beat = m.Heartbeat(self.beats, None, (), held, tuple(said[name]))
            self.rig.handle(m.FromAgent(live.session, beat))

    def save(self, attempt_id: str) -> None:
        """Rank 0 says at which step; all ranks of a gang do it together."""
        attempt = self.state.attempts[attempt_id]
        job = self.state.jobs[attempt.job_id]
        step = int(self.steps.get(attempt_id, 0))
        gang = self.state.gang(job)
        whole = all(rank.phase in TRAINS for rank in gang)
        if attempt.rank or step <= job.head_step or not whole:
            return
        several = attempt.ranks if attempt.ranks > 1 else 0
        for rank in gang:
            digest, parent = f"{rank.id}@{step}", job.head
            body = m.CheckpointProposed(digest, parent, step, GIGABYTE, (rank.node,), several)
            self.say(rank.id, body)

    def end(self, job_id: int) -> None:
        """All ranks that still run."""
        for attempt in self.state.gang(self.state.jobs[job_id]):
            self.say(attempt.id, m.AttemptExited(0))

    def say(self, attempt_id: str, body: m.AgentEventBody) -> None:
        live = self.state.nodes[self.state.attempts[attempt_id].node]
        assert live.session is not None
        event = m.AgentEvent(live.node.acknowledged + 1, self.rig.now.unix_ms, attempt_id, body)
        self.rig.handle(m.FromAgent(live.session, event))

    def job(self, job_id: int) -> Job:
        return self.state.jobs[job_id]

    def type_of(self, job_id: int) -> str:
        """What it runs on; empty for one that does not."""
        gpus = {uuid: gpu for live in self.state.nodes.values() for uuid, gpu in live.gpus.items()}
        job = self.job(job_id)
        if job.phase is not JobPhase.ACTIVE:
            return ""
        held = [uuid for rank in self.state.gang(job) for uuid in rank.gpu_uuids]
        keys = {key_of(gpus[uuid].facts.name, gpus[uuid].facts.memory_bytes): 0 for uuid in held}
        return " and ".join(keys)

    def stops(self) -> list[str]:
        events = self.rig.disk.events
        return [event.message for event in events if event.name == "attempt.stopping"]


def training(steps: int, **asks: object) -> JobSpec:
    """Of one model: the second is known by what the first has done."""
    told = json.dumps({"model": "m", "train_data": "d", "steps": steps})
    spec = JobSpec(trainer="finetune", trainer_config_json=told, gpus=1)
    return replace(spec, **asks)  # type: ignore[arg-type]
