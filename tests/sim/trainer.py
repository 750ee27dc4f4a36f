"""A training process of the simulation.

It takes steps, hands over a checkpoint every few of them, saves and leaves with status 75 when it
is asked to (or does not, if it is that kind), crashes where its program says so, and leaves with 0
after its last step. Every other job has a slab, captures into it, also when it is asked to ahead of
a stop, and crashes after a capture that it did not live to hand over. It belongs to its box: the
agent may come and go. What the SDK promises it keeps: it says hello on every connection and hands
over again what nobody answered. A rank of a gang takes every step together with the others
(`gang.py`), and each hands over its part.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from agent.core.trainer_messages import (
    TrainerCheckpoint,
    TrainerHeedsSaves,
    TrainerHello,
    TrainerMessage,
    TrainerMilestone,
    TrainerProgress,
    TrainerSlab,
    capture_name,
)
from agent.core.values import Launch, ProcessExit
from tests.sim.checkers import Content
from tests.sim.gang import Word

if TYPE_CHECKING:
    from tests.sim.box import Box, SimTrainers

CONNECT_MS = 300  # how long a trainer's back-off lets a new agent wait for it, at most
SLOTS = 2  # of a slab
LAST_WORD_MS = 20_000  # how long it waits for its last checkpoint to be stored


class Slab:
    """Two slots of memory, the older capture first, each one of so many parts. A capture whose
    checkpoint nobody has answered for is not overwritten."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.captures: dict[str, Content] = {}

    def put(self, name: str, content: Content, waiting: set[str]) -> bool:
        """Whether there was a slot for it."""
        free = next((known for known in self.captures if known not in waiting), None)
        if len(self.captures) >= SLOTS and free is None:
            return False
        if len(self.captures) >= SLOTS and free is not None:
            del self.captures[free]
        self.captures[name] = content
        return True


class Trainer:
    """`restored` is what lay in its restore directory. The program stands in the job's command."""

    def __init__(self, box: "Box", launch: Launch, restored: Content | None) -> None:
        environment = dict(launch.environment)
        self.box = box
        self.attempt_id = launch.attempt_id
        self.job_id = int(environment["BATON_JOB_ID"])
        self.epoch = int(environment["BATON_EPOCH"])
        self.rank = int(environment.get("RANK", 0))
        self.world_size = int(environment.get("WORLD_SIZE", 1))
        self.token = environment["BATON_TOKEN"]
        self.gpu_uuids = _own_gpus(environment)
        self.program: dict[str, int] = json.loads(launch.arguments[1])
        self.restored = restored if "BATON_RESTORE_DIR" in environment else None
        self.step = self.restored.step if self.restored is not None else 0
        self.first_step = self.step
        self.alive = True
        self.stuck = False
        self._history = self.restored.history if self.restored is not None else ()
        self._asked = asyncio.Event()
        self._save_asked = False
        self._answered = asyncio.Event()
        self.slab = Slab(self.world_size) if self.job_id % 2 else None
        self._last_id = 0
        self._waiting: dict[int, TrainerCheckpoint] = {}
        self._task: asyncio.Task[None] | None = None
        self._gang = box.around.gang(self.job_id, self.epoch, self.world_size)
        self._due = False
        self.began_s = 0.0

    def begin(self) -> None:
        loop = asyncio.get_running_loop()
        self.began_s = loop.time()
        self._task = loop.create_task(self._run())

    def sink(self) -> None:
        """From here on it waits in the kernel for a device that does not answer: it does nothing,
        and no signal reaches it."""
        self.stuck = True
        if self._task is not None:
            self._task.cancel()

    def end(self, exit_code: int | None, signal: int | None) -> None:
        """It is gone, unless nothing can end it; its box writes down how."""
        if not self.alive or self.stuck:
            return
        self.vanish(f"exit {exit_code} signal {signal}")
        self.box.trainer_ended(self, ProcessExit(self.attempt_id, exit_code, signal))

    def vanish(self, why: str) -> None:
        self.alive = False
        self.box.around.trace(f"{self.box.name} trainer {self.attempt_id} ends: {why}")
        self.box.around.checkers.process_ended(self, why)
        if self.world_size > 1:
            self._gang.left()
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
        elif kind == "save":
            assert self.slab is not None, "it never said that it looks for requests"
            assert self.rank == 0, "the others hear of it from rank 0"
            self._save_asked = True
        elif kind == "stop":
            self.ask_to_stop()

    def reconnect(self) -> None:
        """An agent listens; the back-off finds it in a while."""
        delay_s = self.box.around.chance.randint(10, CONNECT_MS) / 1000
        asyncio.get_running_loop().call_later(delay_s, self._connected)

    def _connected(self) -> None:
        if self.alive and not self.stuck:
            self._say(TrainerHello(1))
            socket = self.box.socket
            if self.slab is not None and socket is not None and self._known(socket):
                socket.slabs.adopt(self.attempt_id, self.slab)
                self._say(TrainerSlab(100_000_000, SLOTS))
                if self.rank == 0:  # it tells the others
                    self._say(TrainerHeedsSaves())
            for message in self._waiting.values():
                self._say(message)

    def _say(self, message: TrainerMessage) -> None:
        socket = self.box.socket
        if socket is not None and self._known(socket):
            socket.said(self.attempt_id, message)

    def _known(self, socket: "SimTrainers") -> bool:
        return socket.tokens.get(self.attempt_id) == self.token

    async def _run(self) -> None:
        self.reconnect()
        self._say(TrainerMilestone("imports", 1_790_000_000_000))
        if self.program.get("doomed"):
            await asyncio.sleep(0.4)
            self.end(1, None)
            return
        while self.step < self.program["steps"]:
            try:
                words = await self._meet()
            except ConnectionError:
                self.end(1, None)
                return
            if any(word.asked for word in words):
                await self._leave(75)
                return
            await self._wait(self._asked, self.program["step_ms"])
            self.step += 1
            self._say(TrainerProgress(self.step, self.program["steps"], (("loss", 1 / self.step),)))
            if self.step == self.program.get("crash_at") and self.epoch == 1 and self.rank == 0:
                if self.slab is not None:
                    self._capture(self.slab)
                self.end(None, 11)
                return
            asked = self._save_asked if self.world_size == 1 else words[0].save
            self._due = self._due or asked or self.step % self.program["every"] == 0
            # A rank that is not ready would fall behind, and no step would be common any more.
            if self._due and (self.world_size == 1 or not any(word.busy for word in words)):
                self._due = self._save_asked = False
                self._save()
        await self._leave(0)

    async def _meet(self) -> tuple[Word, ...]:
        word = Word(self._asked.is_set(), bool(self._waiting), self._save_asked)
        return (word,) if self.world_size == 1 else await self._gang.meet(self.rank, word)

    async def _wait(self, event: asyncio.Event, limit_ms: int) -> None:
        try:
            async with asyncio.timeout(limit_ms / 1000):
                await event.wait()
        except TimeoutError:
            return

    async def _leave(self, status: int) -> None:
        if self.step > self.first_step:
            self._save(last=True)
        deadline_s = asyncio.get_running_loop().time() + LAST_WORD_MS / 1000
        while self._waiting and asyncio.get_running_loop().time() < deadline_s:
            self._answered.clear()
            await self._wait(self._answered, 1_000)
        self.end(status, None)

    def _save(self, *, last: bool = False) -> None:
        """Capture, or build a checkpoint directory, and hand it over. Without a free slot it is
        put off, unless it is the last one."""
        if self.slab is not None:
            path = self._capture(self.slab)
            if not path and not last:
                return
        else:
            path = ""
        if not path:
            self._last_id += 1
            path = f"/attempts/{self.attempt_id}/staging/{self.step}-{self._last_id}"
            self.box.disk.staging[path] = self._content()
        message = TrainerCheckpoint(self._last_id, path, self.step, parts=self.world_size)
        self._waiting[self._last_id] = message
        self._say(message)

    def _capture(self, slab: Slab) -> str:
        """Its name, or nothing where no slot is free."""
        name = capture_name(self.job_id, self._last_id + 1)
        waiting = {message.path for message in self._waiting.values()}
        if not slab.put(name, self._content(), waiting):
            return ""
        self._last_id += 1
        return name

    def _content(self) -> Content:
        piece = (self.attempt_id, self.first_step, self.step)
        return Content(self.job_id, self.rank, self.step, (*self._history, piece))


def _own_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Ranks with one GPU each see those of all ranks on their node, as torchrun does it."""
    visible = tuple(filter(None, environment["CUDA_VISIBLE_DEVICES"].split(",")))
    local = int(environment.get("LOCAL_RANK", 0))
    count = int(environment.get("LOCAL_WORLD_SIZE", 1))
    return visible[local : local + 1] if count > 1 and len(visible) == count else visible
