"""Histories in which everything that may move a job, or a node, happens together.

Problem: each part of the core has a machine of its own, and what breaks is where two of them meet:
a plan empties a node by handoff while a person forgets it, the driver refuses, the coordinator
restarts, and who was to move shares a GPU with somebody whose deadline has come. Chosen one rule at
a time such a meeting is rare. So a history here is played from a seed, with chances that make it
frequent: nodes alike, jobs that train and save for a while, a forecast that falls and rises, a
driver that does what it likes. All invariants of `test_power_machine.py` hold after every step, and
every job ends when the faults have.

`python -m tests.core.mixed_histories --seeds 1000` searches; it prints what broke, by seed, and how
often what happened.
"""

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace

import pytest

from coordinator.core import consolidation, costs
from coordinator.core.allocation import Aims
from coordinator.core.bursts import Burst
from coordinator.core.capacity_model import LEVELS
from coordinator.core.demand_messages import ForecastMade, MakeForecast, TypeForecast
from coordinator.core.guard_rails import Bounds
from coordinator.core.messages import (
    AppendEvent,
    AttemptExited,
    CancelJob,
    CordonNode,
    DrainNode,
    Effect,
    HoldJob,
    Log,
    ReleaseJob,
    RequeueJob,
    SessionClosed,
    Submit,
    UncordonNode,
)
from coordinator.core.model import JobClass, JobSpec, Replication
from coordinator.core.node_requests import ForgetNode
from coordinator.core.quotas import Quota
from coordinator.core.scaler import ScalingOptions
from coordinator.core.scaling import Mode, Rules
from coordinator.core.state import Options
from tests.core.coordinator_checks import Moves
from tests.core.coordinator_fleet import FakeNode
from tests.core.coordinator_harness import GIGABYTE, UNIX_MS_AT_START, Rig, gpus_of
from tests.core.test_power_machine import SWITCHED, SwitchedFleet, WishedRig

FLEET = {"n1": "2xH100:80", "n2": "2xH100:80", "n3": "2xH100:80", "n4": "2xA100:40", "n5": ""}
RENTED = "r1"
MOVES_PER_HOUR = 30
MINUTE_MS = 1_000  # of the plan's time: two hours are two minutes
JOBS_MAX = 24
RULES = Rules(
    idle_ms_min=60_000,
    cycle_usd_per_gpu=0.0,
    bounds=Bounds(down_min=2, up_min=3, spares_min=0, up_ms_min=0, cycles_per_day_max=50,
                  coverage_min=0.0, gap_ms_max=10**9),
    bursts={"H100": Burst(2.0, gpus_per_node=2)},
    budget_usd_per_day=10**6,
    spends_alone=True,
)  # fmt: skip
OPTIONS = Options(
    aims=Aims(run_s_min=2.0),
    moves_per_hour=MOVES_PER_HOUR,
    power=SWITCHED,
    scaling=ScalingOptions(RULES, Mode.ACT, 3_000, {"H100": {RENTED: None}}),
    projects={"a": Quota(0.01), "b": Quota(100.0, 2.0)},
    demand_minute_ms=MINUTE_MS,
    reservation_wait_ms=20_000,
    reservation_ms=60_000,
)
FATES = ("do", "do", "do", "do", "lie", "refuse", "silent", "again", "postpone")


# In the reason of a stop, and what that is.
STOPS = {
    "can go off": "emptied by handoff", "moves to": "moved", "gives way": "displaced",
    "is emptied": "emptied to go off", "to keep its deadline": "for a deadline",
    "another GPU is free": "parted", "only where that pays": "parted",
}  # fmt: skip


class Mixed(SwitchedFleet):
    """`level` is how much of the fleet the forecast wants; `seen` what has happened, how often."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.level = 1.0
        self.asked: MakeForecast | None = None
        super().__init__()
        self.moves = Moves(MOVES_PER_HOUR)
        self.nodes[RENTED] = FakeNode(RENTED, gpus_of(RENTED, "2xH100:80"))

    def new_rig(self) -> Rig:
        return WishedRig(OPTIONS)

    def new_nodes(self) -> dict[str, FakeNode]:
        return {name: FakeNode(name, gpus_of(name, text)) for name, text in FLEET.items()}

    def judge(self, effects: list[Effect]) -> None:
        super().judge(effects)
        for effect in effects:
            if isinstance(effect, MakeForecast):
                self.asked = effect
            elif isinstance(effect, Log):
                self.seen[effect.event] += 1
            elif isinstance(effect, AppendEvent) and effect.event.name == "attempt.stopping":
                for words, what in STOPS.items():
                    if words in effect.event.message:
                        self.seen[what] += 1

    # --- what happens -----------------------------------------------------------------------------

    def play(self, steps: int) -> None:
        for _ in range(self.chance.randint(3, 9)):
            self.come()
        for _ in range(steps):
            what = self.chance.choices(list(STEPS), list(STEPS.values()))[0]
            getattr(self, what)()
            self.check()
        self.teardown()

    def check(self) -> None:
        for each in self.invariants:
            each.function(self)

    def come(self) -> None:
        if self.state.last_job_id < JOBS_MAX and self.state.nodes:
            number = self.state.last_job_id
            self.ask(Submit(self.spec(), request_id=f"m{number}"))
            self.flow()

    def spec(self) -> JobSpec:
        chance = self.chance
        gpus, ranks = chance.choice(
            ((1, 1), (1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (1, 3), (0, 1))
        )
        now_unix_ms = UNIX_MS_AT_START + self.rig.now_ms
        spec = JobSpec(
            command=("train", str(chance.randint(0, 2))),
            project=chance.choice(("a", "b", "c")),
            job_class=chance.choice((JobClass.STANDARD, JobClass.STANDARD, *JobClass)),
            gpus=gpus,
            ranks=ranks,
            max_restarts=chance.randint(0, 3),
            replication=chance.choice((Replication.AUTOMATIC, *Replication)),
            grace_ms=chance.choice((2_000, 20_000)),
        )
        kind = chance.choice(("", "", "", "", "deadline", "flexible", "share"))
        if kind == "share" and (gpus, ranks) == (1, 1):
            size_bytes = chance.choice((8, 20)) * GIGABYTE
            automatic = chance.random() < 0.7
            in_ms = chance.choice((0, 0, 20_000, 60_000))
            return replace(
                spec,
                shared_gpu_memory_bytes=size_bytes,
                share_automatic=automatic,
                deadline_unix_ms=now_unix_ms + in_ms if in_ms else 0,
            )
        if kind == "deadline" and gpus:
            in_ms = chance.choice((20_000, 60_000, 200_000))
            return replace(spec, deadline_unix_ms=now_unix_ms + in_ms)
        if kind == "flexible" and gpus:
            return replace(spec, flexible_ms=chance.choice((20_000, 120_000)))
        return spec

    def train(self) -> None:
        """All go on for a while, save together, and drivers and forecasts speak."""
        self.pass_time(self.chance.choice((2, 4, 8)), flowing=self.chance.random() < 0.9)
        copied = self.chance.random() < 0.8
        if self.chance.random() < 0.7:
            for node in self.nodes.values():
                for run in node.living():
                    self._save(node, run, copied)
                self.settle(node)
        self.obey()
        if self.chance.random() < 0.9:
            self.forecast()
        for name in list(self.orders):
            if self.chance.random() < 0.6:
                self.drive(name, self.chance.choice(FATES), 0)

    def obey(self) -> None:
        """Most who were asked to stop have saved, and leave."""
        for node in self.nodes.values():
            for run in node.living():
                if run.stopping and self.chance.random() < 0.8:
                    self._save(node, run, copied=True)
                    node.end(run, AttemptExited(75))
            self.settle(node)

    def forecast(self) -> None:
        if self.asked is None:
            return
        types = []
        for each in self.asked.types:
            soon = self.level * 6.0
            later = soon * self.chance.choice((0.5, 1.0))
            types.append(TypeForecast(each.gpu_type, (soon,) * len(LEVELS), (later,) * len(LEVELS)))
        self.apply(ForecastMade(self.asked.minute, tuple(types)))

    def fall(self) -> None:
        self.level = self.chance.choice((0.0, 0.0, 0.3, 0.6, 1.5))

    def trough(self) -> None:
        """Nobody waits any more, one is left on most nodes, and little is expected: they go on
        together, and nodes may go off."""
        self.level = 0.0
        for job_id in list(self.state.queued):
            self.ask(CancelJob(job_id))
        for name in ("n1", "n2", "n3"):
            self.ask(UncordonNode(name))
        self.train()
        for node in self.nodes.values():
            for run in node.living()[1:]:
                if self.chance.random() < 0.8:
                    node.end(run, AttemptExited(0))
            self.settle(node)
        for _ in range(self.chance.randint(2, 4)):
            self.train()

    def leave(self) -> None:
        found = self.run_of(self.chance.randint(0, 20))
        if found is not None:
            code = self.chance.choice((0, 0, 0, 1, 75, None))
            found[0].end(found[1], AttemptExited(code, 9 if code is None else None))
            self.settle(found[0])

    def owner(self) -> None:
        wish = self.chance.choice((CancelJob, HoldJob, ReleaseJob, RequeueJob, RequeueJob))
        job_id = self.chance.randint(1, max(1, self.state.last_job_id))
        self.ask(wish(job_id))
        self.ask(RequeueJob(job_id, abandon_unreachable_checkpoints=True))

    def person(self) -> None:
        name = self.chance.choice(list(self.state.nodes) or ["n1"])
        wish = self.chance.choice((CordonNode, DrainNode, UncordonNode, UncordonNode, ForgetNode))
        self.ask(wish(name))

    def forget(self) -> None:
        """A node that is dark, or lost."""
        for name, live in list(self.state.nodes.items()):
            if live.phase.value == "lost" and self.chance.random() < 0.5:
                self.ask(ForgetNode(name, lose_checkpoints=self.chance.random() < 0.3))
                self.seen["forgotten"] += name not in self.state.nodes
                return

    def die(self) -> None:
        node = self.nodes[self.chance.choice(list(self.nodes))]
        session = node.session
        fate = self.chance.choice((node.cut, node.cut, node.die, node.wipe))
        fate()
        if self.chance.random() < 0.6 and session is not None:
            self.close(session, SessionClosed())

    def dial_again(self) -> None:
        for node in self.nodes.values():
            live = self.state.nodes.get(node.name)
            dark = live is not None and live.node.power.phase.value in ("off", "starting")
            unknown = live is None and node.name == RENTED
            if (
                node.session is None
                and not unknown
                and self.chance.random() < (0.1 if dark else 0.7)
            ):
                self.dial(node)
                self.settle(node)

    def restart(self) -> None:
        name = self.chance.choice(list(self.nodes))
        self.calamity(
            name, self.chance.choice(("restart", "crash", "sleep", "leave", "away", "rot"))
        )
        self.seen["restarted"] += 1


# How likely a step is.
STEPS = {
    "train": 16, "come": 6, "fall": 3, "trough": 3, "leave": 4, "owner": 2, "person": 2,
    "forget": 1, "die": 2, "dial_again": 4, "restart": 1,
}  # fmt: skip


def play(seed: int, steps: int = 50) -> Counter[str]:
    """One history; raises what broke."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "RESTART_S_DEFAULT", 0.1)
        patch.setattr(consolidation, "RUN_PER_RESTART_MIN", 1.0)
        fleet = Mixed(seed)
        fleet.play(steps)
        return fleet.seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.core.mixed_histories")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    seen: Counter[str] = Counter()
    failed, begun_s = 0, time.process_time()
    for seed in range(options.start, options.start + options.seeds):
        try:
            seen += play(seed, options.steps)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error).splitlines()[0][:300] if str(error) else ""
            what = f"{type(error).__name__} {said} at {where.name}:{where.lineno}"
            print(f"seed {seed}: {what}", flush=True)
        if sys.stderr.isatty() or seed % 50 == 49:
            print(f"... {seed + 1}", file=sys.stderr, flush=True)
    print(
        f"{options.seeds} histories, {failed} failed, {time.process_time() - begun_s:.0f} s of CPU"
    )
    print(", ".join(f"{name} {count}" for name, count in sorted(seen.items()) if count))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
