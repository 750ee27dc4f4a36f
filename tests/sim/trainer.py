"""A training process of the simulation.

It takes steps, hands over a checkpoint every few of them, saves and leaves with status 75 when it
is asked to (or does not, if it is that kind), crashes where its program says so, and leaves with 0
after its last step. It belongs to its box: the agent may come and go. What the SDK promises it
keeps: it says hello on every connection and hands over again what nobody answered.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from agent.core.trainer_messages import (
    TrainerCheckpoint,
    TrainerHello,
    TrainerMessage,
    TrainerMilestone,
    TrainerProgress,
)
from agent.core.values import Launch, ProcessExit
from tests.sim.checkers import Content

if TYPE_CHECKING:
    from tests.sim.box import Box

CONNECT_MS = 300  # how long a trainer's back-off lets a new agent wait for it, at most
LAST_WORD_MS = 20_000  # how long it waits for its last checkpoint to be stored


class Trainer:
    """`restored` is what lay in its restore directory. The program stands in the job's command."""

    def __init__(self, box: "Box", launch: Launch, restored: Content | None) -> None:
        environment = dict(launch.environment)
        self.box = box
        self.attempt_id = launch.attempt_id
        self.job_id = int(environment["BATON_JOB_ID"])
        self.token = environment["BATON_TOKEN"]
        self.gpu_uuids = tuple(filter(None, environment["CUDA_VISIBLE_DEVICES"].split(",")))
        self.program: dict[str, int] = json.loads(launch.arguments[1])
        self.restored = restored if "BATON_RESTORE_DIR" in environment else None
        self.step = self.restored.step if self.restored is not None else 0
        self.first_step = self.step
        self.alive = True
        self._history = self.restored.history if self.restored is not None else ()
        self._asked = asyncio.Event()
        self._answered = asyncio.Event()
        self._last_id = 0
        self._waiting: dict[int, TrainerCheckpoint] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def end(self, exit_code: int | None, signal: int | None) -> None:
        """It is gone; its box writes down how."""
        if not self.alive:
            return
        self.vanish(f"exit {exit_code} signal {signal}")
        self.box.trainer_ended(self, ProcessExit(self.attempt_id, exit_code, signal))

    def vanish(self, why: str) -> None:
        self.alive = False
        self.box.around.trace(f"{self.box.name} trainer {self.attempt_id} ends: {why}")
        self.box.around.checkers.process_ended(self, why)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def ask_to_stop(self) -> None:
        if not self.program.get("deaf"):
            self._asked.set()

    def hear(self, message: Mapping[str, object]) -> None:
        """The agent's word."""
        kind, number = message["type"], message.get("id")
        if kind in ("stored", "refused", "committed"):
            self._waiting.pop(int(str(number)), None)
            self._answered.set()
        elif kind == "stop":
            self.ask_to_stop()

    def reconnect(self) -> None:
        """An agent listens; the back-off finds it in a while."""
        delay_s = self.box.around.chance.randint(10, CONNECT_MS) / 1000
        asyncio.get_running_loop().call_later(delay_s, self._connected)

    def _connected(self) -> None:
        if self.alive:
            self._say(TrainerHello(1))
            for message in self._waiting.values():
                self._say(message)

    def _say(self, message: TrainerMessage) -> None:
        socket = self.box.socket
        if socket is not None and socket.tokens.get(self.attempt_id) == self.token:
            socket.said(self.attempt_id, message)

    async def _run(self) -> None:
        self.reconnect()
        self._say(TrainerMilestone("imports", 1_790_000_000_000))
        if self.program.get("doomed"):
            await asyncio.sleep(0.4)
            self.end(1, None)
            return
        while self.step < self.program["steps"]:
            if self._asked.is_set():
                await self._leave(75)
                return
            await self._wait(self._asked, self.program["step_ms"])
            self.step += 1
            self._say(TrainerProgress(self.step, self.program["steps"], (("loss", 1 / self.step),)))
            if self.step == self.program.get("crash_at") and self.attempt_id.endswith(".1"):
                self.end(None, 11)
                return
            if self.step % self.program["every"] == 0:
                self._save()
        await self._leave(0)

    async def _wait(self, event: asyncio.Event, limit_ms: int) -> None:
        try:
            async with asyncio.timeout(limit_ms / 1000):
                await event.wait()
        except TimeoutError:
            return

    async def _leave(self, status: int) -> None:
        if self.step > self.first_step:
            self._save()
        deadline_s = asyncio.get_running_loop().time() + LAST_WORD_MS / 1000
        while self._waiting and asyncio.get_running_loop().time() < deadline_s:
            self._answered.clear()
            await self._wait(self._answered, 1_000)
        self.end(status, None)

    def _save(self) -> None:
        """Build a checkpoint directory and hand it over."""
        piece = (self.attempt_id, self.first_step, self.step)
        content = Content(self.job_id, self.step, (*self._history, piece))
        self._last_id += 1
        path = f"/attempts/{self.attempt_id}/staging/{self.step}-{self._last_id}"
        self.box.disk.staging[path] = content
        message = TrainerCheckpoint(self._last_id, path, self.step)
        self._waiting[self._last_id] = message
        self._say(message)
