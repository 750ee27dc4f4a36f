"""Between the core's orders and the drivers: each order is carried out once, in bounded time, and
somebody always says what came of it.

Problem: a driver hangs, lies, does a thing twice, or breaks; and the coordinator that gave the
order may be restarted in between. None of this may cost a heartbeat or a second machine.

An order falls into pieces: a list of nodes for a driver that takes lists, else one node each. For
each piece, in a task of its own:

1. It waits for earlier orders for its nodes, and for one of `PIECES_MAX` places of its group: one
   whose devices hang holds up no other.
   One to switch off that has waited for `STALE_RATIO` deadlines is not begun any more: the core may
   have given it up, and its node taken work again. That is no failure of the node's: it is reported
   as postponed, and is not noted, so that a successor which still wants it begins it. One that was
   begun before a restart is late in the same way, but may have been done: it has failed.
2. "Begun" is noted in the journal. A node whose key is noted as ended never gets here: its outcome
   is reported again. One that is noted as begun, of a coordinator that is no more, is looked at
   first; where it is not as ordered the deed is done again, but for CREATE: it fails.
3. The driver applies it; then its state is asked for until it is as ordered (who cannot see his
   nodes is believed, and the node's own hello is the proof).
4. At the deadline of its group the piece is abandoned: its task is cancelled, which ends its child
   processes, and nobody waits for it any more. What succeeds later is not heard; the node itself
   says hello or falls silent.
5. Nodes of a CREATE that failed are rolled back, within a deadline of the same length: what there
   may be of them costs money. Not so a node that is up: it is there, whatever its driver says. And
   not one that nobody can see and that a coordinator before this one has begun: it may be at work,
   and not yet here again. That is said loudly, for a person to look.
6. The end is noted, logged and reported, node by node. A driver's bug is a failure with a reason.

Time comes from the clock that it is given, so a test decides when a deadline has passed.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.capacity import hostlist
from coordinator.capacity.driver import WANTED, CapacityError, Driver, State, verify
from coordinator.capacity.journal import Deed, Journal, Stage
from coordinator.core.capacity_orders import CapacityOrder, CapacityOutcome, Verb
from coordinator.ports import Clock

# At once, of a group; a management network and a provider's limits take no more.
PIECES_MAX: Final = 16
WAITING_MAX: Final = 1_000  # pieces; guard rails let through a fraction of a fleet in ten minutes
# Deadlines; with the one that it then has, less than what the core waits for a word of it.
STALE_RATIO: Final = 2
LOOK_MS: Final = 2_000  # between two looks at a node that is not yet as ordered
CLOSE_S: Final = 3.0  # a stop must not wait for somebody else's device

_Reasons = dict[str, str]  # for each node why it is not as ordered; empty where it is
Report = Callable[[CapacityOutcome], None]
Log = Callable[[str, str, tuple[tuple[str, object], ...]], None]


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes with one driver, as they are configured."""

    name: str
    driver: Driver
    deadline_ms: int


@dataclass(slots=True)
class _Piece:
    """`given_ms`: when it was ordered, in this process. `left`: what is wrong with each node, as
    far as is known; empty where it is as ordered. `unseen`: nodes that may be at work, for all that
    is known. `postponed`: it was not begun, for no reason of its nodes."""

    group: Group
    order: CapacityOrder
    begun_before: bool
    given_ms: int
    left: _Reasons = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    postponed: bool = False


class Actuator:
    """`groups` by node. `report` is called in the event loop, once for each node of an order, and
    never within `give`. `is_up`: has the node said hello, and is not lost?"""

    def __init__(
        self,
        groups: Mapping[str, Group],
        journal: Journal,
        clock: Clock,
        report: Report,
        *,
        is_up: Callable[[str], bool],
        log: Log,
    ) -> None:
        self._groups = groups
        self._journal = journal
        self._clock = clock
        self._report = report
        self._is_up = is_up
        self._log = log
        names = dict.fromkeys(group.name for group in groups.values())
        self._places = {name: asyncio.Semaphore(PIECES_MAX) for name in names}
        self._writing = asyncio.Lock()
        self._running: dict[tuple[str, str], asyncio.Task[_Reasons]] = {}  # by key and node
        self._latest: dict[str, asyncio.Task[_Reasons]] = {}  # by node
        self._abandoned: dict[int, asyncio.Task[None]] = {}

    def give(self, order: CapacityOrder) -> None:
        """Returns at once, and never raises. The same order again is no second deed."""
        pieces: dict[tuple[str, str, bool], tuple[Group, list[str]]] = {}
        for node in dict.fromkeys(order.nodes):
            if (order.key, node) in self._running:
                continue
            seen = self._journal.seen(order.key, node)
            group = self._groups.get(node)
            if seen is not None and seen.stage is not Stage.BEGUN:
                self._answer(order.key, node, seen.reason, done=seen.stage is Stage.DONE)
            elif group is None:
                reason = f"no group of 'capacity' in the configuration has the node {node}"
                self._answer(order.key, node, reason)
            elif len(self._running) >= WAITING_MAX:
                count = len(self._running)
                reason = f"{count} nodes wait for their drivers"
                reason = reason if count > 1 else "1 node waits for its driver"
                self._answer(order.key, node, reason, postponed=True)
            else:
                part = "" if group.driver.takes_lists else node
                pieces.setdefault((group.name, part, seen is not None), (group, []))[1].append(node)
        for (_, _, begun_before), (group, nodes) in pieces.items():
            part_of_it = replace(order, nodes=tuple(nodes))
            self._start(_Piece(group, part_of_it, begun_before, self._clock.now_ms()))

    async def close(self) -> None:
        """Abandon what runs; the journal knows it as begun."""
        tasks = [*self._running.values(), *self._abandoned.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        if self._abandoned:
            await asyncio.wait(list(self._abandoned.values()), timeout=CLOSE_S)

    def _answer(
        self, key: str, node: str, reason: str, *, done: bool = False, postponed: bool = False
    ) -> None:
        outcome = CapacityOutcome(key, node, done, reason, postponed)
        asyncio.get_running_loop().call_soon(self._report, outcome)

    def _start(self, piece: _Piece) -> None:
        earlier = {id(task): task for node in piece.order.nodes if (task := self._latest.get(node))}
        task = asyncio.get_running_loop().create_task(
            self._carry_out(piece, list(earlier.values()))
        )
        for node in piece.order.nodes:
            self._running[piece.order.key, node] = task
            self._latest[node] = task
        task.add_done_callback(lambda ended: self._ended(piece, ended))

    def _ended(self, piece: _Piece, task: asyncio.Task[_Reasons]) -> None:
        key = piece.order.key
        for node in piece.order.nodes:
            del self._running[key, node]
            if self._latest[node] is task:
                del self._latest[node]
        if not task.cancelled():
            for node, reason in task.result().items():
                self._report(CapacityOutcome(key, node, not reason, reason, piece.postponed))

    async def _carry_out(
        self, piece: _Piece, earlier: Sequence[asyncio.Task[_Reasons]]
    ) -> _Reasons:
        if earlier:
            await asyncio.wait(earlier)
        async with self._places[piece.group.name]:
            order = piece.order
            problem = self._why_stale(piece) or await self._note(
                [Deed(order.key, node, Stage.BEGUN) for node in order.nodes]
            )
            piece.postponed = bool(problem) and not piece.begun_before
            if problem:
                reasons = dict.fromkeys(order.nodes, problem)
            else:
                self._log(
                    "info",
                    "capacity.ordered",
                    (
                        ("key", order.key),
                        ("verb", order.verb.value),
                        ("nodes", hostlist.written(order.nodes)),
                        ("group", piece.group.name),
                    ),
                )
                reasons = await self._reasons(piece)
                if order.verb is Verb.CREATE:
                    reasons = await self._without_remains(piece, reasons)
            await self._finish(piece, reasons)
            return reasons

    def _why_stale(self, piece: _Piece) -> str:
        """Empty, or why it is not begun any more."""
        waited_ms = self._clock.now_ms() - piece.given_ms
        late = waited_ms > STALE_RATIO * piece.group.deadline_ms
        if not late or piece.order.verb not in (Verb.SUSPEND, Verb.DELETE):
            return ""
        waited = f"it waited for its turn for {waited_ms // 1000} s"
        if piece.begun_before:
            return f"{waited} after a restart, and is not begun again"
        return f"{waited}, and is not begun any more"

    async def _reasons(self, piece: _Piece) -> _Reasons:
        problem = await self._within(piece.group, self._deed(piece))
        if not problem:
            return piece.left
        return {
            # A look has shown more than that the time was up.
            node: piece.left.get(node, problem)
            for node in piece.order.nodes
        }

    async def _deed(self, piece: _Piece) -> None:
        """Until every node is as ordered."""
        driver, order = piece.group.driver, piece.order
        if piece.begun_before and await self._is_settled(piece):
            return
        await driver.apply(order)
        while True:
            try:
                piece.left = await verify(driver, order)
            except CapacityError as error:
                piece.left = dict.fromkeys(order.nodes, str(error))
            if not any(piece.left.values()):
                return
            await self._clock.sleep_ms(LOOK_MS)

    async def _is_settled(self, piece: _Piece) -> bool:
        """Is there nothing to do any more of what was begun before a restart?"""
        order, wanted = piece.order, WANTED[piece.order.verb]
        if order.verb is not Verb.CREATE:
            states = await piece.group.driver.state(order.nodes)
            if any(states.get(node) is not wanted for node in order.nodes):
                return False
            piece.left = dict.fromkeys(order.nodes, "")
            return True
        piece.unseen = order.nodes
        states = await piece.group.driver.state(order.nodes)
        piece.unseen = tuple(n for n in order.nodes if states.get(n) not in (State.ON, State.OFF))
        piece.left = {
            node: ""
            if states.get(node) is wanted
            else "its creation was begun before a restart, and nobody can say whether it is there"
            if node in piece.unseen
            else "its creation was begun before a restart, and it is not there"
            for node in order.nodes
        }
        return True

    async def _within(self, group: Group, work: Coroutine[None, None, None]) -> str:
        """Do `work` until the deadline of `group`. Empty, or why it was not done."""
        task = asyncio.create_task(work)
        deadline = asyncio.create_task(self._clock.sleep_ms(group.deadline_ms))
        try:
            await asyncio.wait((task, deadline), return_when=asyncio.FIRST_COMPLETED)
        finally:
            deadline.cancel()
            if not task.done():
                self._abandon(task)
        if not task.done():
            seconds = group.deadline_ms / 1000
            return f"the driver of '{group.name}' was not done within {seconds:g} s"
        if task.cancelled():
            return f"the driver of '{group.name}' broke: it has given up"
        error = task.exception()
        if error is None or isinstance(error, CapacityError):
            return str(error or "")
        return f"the driver of '{group.name}' broke: {error!r}"

    def _abandon(self, task: asyncio.Task[None]) -> None:
        """Nobody waits for it any more; it is only kept from being lost before it has ended."""
        self._abandoned[id(task)] = task
        task.cancel()
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._abandoned[id(task)]
        if not task.cancelled():
            task.exception()  # looked at, so that the loop does not complain

    async def _without_remains(self, piece: _Piece, reasons: _Reasons) -> _Reasons:
        """`reasons`, when nothing is left of nodes whose creation has failed."""
        found = {node: "" if self._is_up(node) else why for node, why in reasons.items()}
        failed = tuple(node for node in found if found[node] and node not in piece.unseen)
        unseen = tuple(node for node in found if found[node] and node in piece.unseen)
        if failed:
            part = replace(piece.order, nodes=failed)
            problem = await self._within(piece.group, piece.group.driver.roll_back(part))
            if problem:
                self._say_remains(piece, failed, problem)
            else:
                key, nodes = piece.order.key, hostlist.written(failed)
                self._log("warning", "capacity.rolled_back", (("key", key), ("nodes", nodes)))
        if unseen:
            self._say_remains(piece, unseen, found[unseen[0]])
        return found

    def _say_remains(self, piece: _Piece, nodes: Sequence[str], reason: str) -> None:
        key, names = piece.order.key, hostlist.written(nodes)
        fields = (("key", key), ("nodes", names), ("reason", reason))
        self._log("error", "capacity.not_rolled_back", fields)

    async def _finish(self, piece: _Piece, reasons: Mapping[str, str]) -> None:
        order = piece.order
        deeds = [
            Deed(order.key, node, Stage.FAILED if reasons[node] else Stage.DONE, reasons[node])
            for node in order.nodes
            if not piece.postponed
        ]
        # Where this cannot be written, it is looked at again after a restart: nothing is lost.
        if deeds:
            await self._note(deeds)
        verb = order.verb.value
        for reason in dict.fromkeys(reasons.values()):
            nodes = hostlist.written(node for node in order.nodes if reasons[node] == reason)
            key = order.key
            if reason:
                self._log(
                    "warning",
                    "capacity.failed",
                    (("key", key), ("verb", verb), ("nodes", nodes), ("reason", reason)),
                )
            else:
                self._log("info", "capacity.done", (("key", key), ("verb", verb), ("nodes", nodes)))

    async def _note(self, deeds: Sequence[Deed]) -> str:
        """Empty, or why nothing is durable."""
        async with self._writing:
            try:
                await asyncio.to_thread(self._journal.note, deeds)
            except OSError as error:
                return f"the journal of capacity orders cannot be written: {error.strerror}"
        return ""
