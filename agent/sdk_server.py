"""The agent's side of the trainer contract: one Unix socket, JSON lines, version 1.

Problem: any command may be a job, so whatever arrives here may be wrong, hostile or endless, and it
arrives in the process that looks after every other job on the node. A line must never crash the
agent, fill its memory, speak for another attempt, or make it hand over a file that is not the
attempt's own.

How: the first line must be a hello with the token of a registered attempt; it fixes for whom the
connection speaks. Each line is bounded before it is parsed, each field checked for type and range,
and a checkpoint's path is resolved (symbolic links included) and must lie inside the attempt's
staging directory. Whatever fails is answered with one line `{"type":"error","reason":...}` and the
connection is closed. What a checkpoint came to is told to the connection that offered it, a stop to
all of the attempt, since a launcher's ranks may each have one; else the newest is told. While there
is none, words wait in a bounded queue, because a trainer reconnects after an agent's restart.

Memory for captures is asked for and given here, a descriptor beside a line:

    -> {"type":"slab","bytes":N}               slots of at least N bytes, please
    <- {"type":"slab","bytes":N,"slots":1|2}   with the descriptor; or
    <- {"type":"slab_refused","reason":"..."}
    -> {"type":"slab","bytes":N,"slots":2,"offered":true}  with the descriptor: what was given by an
                                               agent that is gone; refused, or taken without a word
    -> {"type":"checkpoint","id":7,"slab":12,"step":120}   the capture with this sequence

A rank of a gang that hands over its part of a checkpoint says how many parts that has; without the
word it is whole:

    -> {"type":"checkpoint","id":7,"path":"/...","step":120,"parts":8}

Where a trainer is (`core/sections.py`), at most some times a second; `count` sections have ended
since it last said so, and the empty name says that it is in none:

    -> {"type":"section","name":"step","count":12,"unix_ms":1790000000000}

A trainer that looks after its steps for requests to save says so, and may be sent one before a
stop (`core/precopy.py`); its answer is a checkpoint:

    -> {"type":"heeds_saves"}
    <- {"type":"save","reason":"n1 is being drained"}

One that hangs is told so before it is killed, and writes what collectives it waits for into its
log (`core/hangs.py`):

    <- {"type":"hung","reason":"hung in step for 130 s (limit 120 s)"}

Its last word may be with what status it leaves, since a launcher has one of its own
(`core/endings.py`):

    -> {"type":"leaving","status":75,"reason":"the disk is full"}

The welcome says `"slabs":true`, `"sections":true`, `"saves":true` and `"leaving":true`, so that a
trainer says none of this to an agent that is older.
"""

import asyncio
import hmac
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import structlog

from agent.core.trainer_messages import (
    TrainerHello,
    TrainerMessage,
    TrainerSection,
    TrainerSlab,
)
from agent.sdk_connection import CHECKPOINT_BITS, Connection, LineTooLong, Registration
from agent.sdk_lines import LineRefused, checkpoint, integer, label, parse, parse_object
from agent.sdk_listener import Listener

PROTOCOL_VERSION = 1
LINE_BYTES_MAX = 64 * 1024  # the contract's; 64 metrics with long names fit many times
CONNECTIONS_PER_ATTEMPT_MAX = 16  # the ranks of one box's trainer, each with a reconnect on its way
CONNECTIONS_UNKNOWN_MAX = 64  # before their hello; more are turned away
HELLO_TIMEOUT_S = 10.0  # a connection that does not say who it is must not hold a place
WARNINGS_MAX = 16  # of an event and attempt; who repeats a mistake for ever fills no journal
WRITE_BUFFER_BYTES_MAX = 1024 * 1024  # a trainer that does not read its answers is cut off here

log = structlog.get_logger()


class Granted(Protocol):
    """A slab as `Slabs.grant` gives it."""

    @property
    def descriptor(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def slots(self) -> int: ...


class SlabDesk(Protocol):
    """Who makes and keeps slabs; `slabs.Slabs` says what the methods do."""

    def grant(self, attempt_id: str, slot_bytes: int) -> Granted | str: ...
    def adopt(self, attempt_id: str, descriptor: int, slot_bytes: int, slots: int) -> str: ...
    def name(self, attempt_id: str, sequence: int) -> str: ...


class SdkServer:
    """Serves `<runtime directory>/trainers.sock`; use as `await open()` ... `await close()`."""

    def __init__(
        self,
        runtime_directory: Path,
        on_message: Callable[[str, TrainerMessage], None],
        slabs: SlabDesk | None = None,
    ) -> None:
        self._listener = Listener(runtime_directory, self._connect)
        self._on_message = on_message
        self._slabs = slabs
        self._registrations: dict[str, Registration] = {}
        self._unknown: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0  # so far
        self._stranger_warnings: Counter[str] = Counter()  # since the last attempt came

    @property
    def socket_path(self) -> str:
        """For `BATON_SOCKET`."""
        return self._listener.path

    async def open(self) -> None:
        """Listen. Raises OSError: path too long, directory not usable, another agent listening."""
        self._listener.open()

    async def close(self) -> None:
        """Stop listening and drop every connection; trainers reconnect to the next agent."""
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def register(self, attempt_id: str, token: str, staging_directory: str) -> None:
        """From now on `token` speaks for the attempt. Once more with the same values changes
        nothing.

        Raises ValueError for an empty token or one that another attempt has.
        """
        self._listener.look()  # its trainer is about to come
        if not token:
            raise ValueError(f"attempt {attempt_id} has an empty token")
        real = os.path.realpath(staging_directory)
        known = self._registrations.get(attempt_id)
        if known is not None and (known.token, known.staging_directory) == (token, real):
            return
        if self._find(token) not in (None, attempt_id):
            raise ValueError(f"the token of attempt {attempt_id} belongs to another attempt")
        self.unregister(attempt_id)
        self._registrations[attempt_id] = Registration(token, real)
        self._stranger_warnings.clear()  # whoever comes now may be another

    def unregister(self, attempt_id: str) -> None:
        """The attempt is over: its connections are closed and its token is unknown from here on."""
        registration = self._registrations.pop(attempt_id, None)
        if registration is not None:
            for connection in registration.connections:
                connection.close()

    def tell(self, attempt_id: str, message: Mapping[str, object]) -> None:
        """Send to whom it concerns, or keep it until there is a connection.

        An attempt that is not registered (any more) is no error: there is nobody to tell.
        """
        registration = self._registrations.get(attempt_id)
        if registration is None:
            return
        program, number = None, message.get("id")
        if isinstance(number, int):
            program = number >> CHECKPOINT_BITS
            message = {**message, "id": number & ((1 << CHECKPOINT_BITS) - 1)}
        line = _encode(message)
        told = [self._send(one, line) for one in registration.whom(program, message)]
        if not any(told) and message.get("type") != "hung":  # who comes later does not hang
            registration.queued.append((program, line))

    def _connect(self, connected: socket.socket) -> None:
        self._connections += 1
        connection = Connection(connected, LINE_BYTES_MAX, self._connections)
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _flush(self, registration: Registration, connection: Connection) -> None:
        """What waited for this program, or for anybody."""
        waiting = list(registration.queued)
        registration.queued.clear()
        for program, line in waiting:
            mine = program is None or program == connection.program
            if not (mine and self._send(connection, line)):
                registration.queued.append((program, line))

    def _send(self, connection: Connection, line: bytes) -> bool:
        """False: it does not read, and is closed; the line waits for the next one."""
        if connection.pending_bytes > WRITE_BUFFER_BYTES_MAX:
            connection.close()
            return False
        connection.send(line)
        return True

    async def _serve(self, connection: Connection) -> None:
        attempt_id = ""
        try:
            attempt_id = await self._greet(connection)
            while (line := await _read_line(connection)) is not None:
                registration = self._registrations.get(attempt_id)
                if registration is None or connection not in registration.connections:
                    return  # unregistered meanwhile
                self._take(attempt_id, registration, connection, parse_object(line))
        except LineRefused as refusal:
            if self._may_warn(attempt_id, "trainer.line_refused"):
                log.warning("trainer.line_refused", attempt=attempt_id, reason=str(refusal))
            connection.send(_encode({"type": "error", "reason": str(refusal)}))
        except OSError as error:  # the other end has gone, or there is no descriptor for a slab
            log.info("trainer.connection_lost", attempt=attempt_id, reason=str(error))
        except asyncio.CancelledError:
            log.debug("trainer.connection_closed", attempt=attempt_id)  # by `close`
        finally:
            self._unknown.discard(connection)
            if connection.in_sections:
                self._on_message(attempt_id, TrainerSection(connection.number, ended=True))
            current = self._registrations.get(attempt_id)
            if current is not None and connection in current.connections:
                current.connections.remove(connection)
            connection.close()

    def _take(
        self,
        attempt_id: str,
        registration: Registration,
        connection: Connection,
        fields: dict[str, object],
    ) -> None:
        """One line after the hello. Raises `LineRefused`."""
        if fields.get("type") == "checkpoint":
            number = integer(fields, "id")
            if number >> CHECKPOINT_BITS:
                raise LineRefused(f"id must be below 2^{CHECKPOINT_BITS}")
            fields["id"] = connection.program << CHECKPOINT_BITS | number
        if self._slabs is not None and fields.get("type") == "slab":
            self._slab(self._slabs, attempt_id, connection, fields)
        elif self._slabs is not None and "slab" in fields and fields.get("type") == "checkpoint":
            name = self._slabs.name(attempt_id, integer(fields, "slab"))
            self._on_message(attempt_id, checkpoint(fields, name))
        elif fields.get("type") == "section":
            section = label(fields["name"]) if fields.get("name") else ""
            source, count = connection.number, integer(fields, "count")
            self._on_message(attempt_id, TrainerSection(source, section, count))
            connection.in_sections = True
        else:
            self._on_message(attempt_id, parse(fields, registration.staging_directory))

    def _slab(
        self, slabs: SlabDesk, attempt_id: str, connection: Connection, fields: dict[str, object]
    ) -> None:
        slot_bytes = integer(fields, "bytes")
        if fields.get("offered") is True:
            slots, descriptor = integer(fields, "slots"), connection.take_descriptor()
            if descriptor is None:
                raise LineRefused("a slab is offered without its descriptor")
            refusal = slabs.adopt(attempt_id, descriptor, slot_bytes, slots)
            if not refusal:
                self._on_message(attempt_id, TrainerSlab(slot_bytes, slots))
                return
            answer = {"type": "slab_refused", "reason": refusal, "offered": True}
        else:
            granted = slabs.grant(attempt_id, slot_bytes)
            if not isinstance(granted, str):
                size, slots = granted.slot_bytes, granted.slots
                line = _encode({"type": "slab", "bytes": size, "slots": slots})
                connection.send(line, [granted.descriptor])
                self._on_message(attempt_id, TrainerSlab(size, slots))
                return
            refusal = granted
            answer = {"type": "slab_refused", "reason": refusal}
        if self._may_warn(attempt_id, "trainer.slab_refused"):
            log.warning("trainer.slab_refused", attempt=attempt_id, reason=refusal)
        connection.send(_encode(answer))

    def _may_warn(self, attempt_id: str, event: str) -> bool:
        """The program is told each time, the log the first times."""
        registration = self._registrations.get(attempt_id)
        due = self._stranger_warnings if registration is None else registration.warnings
        due[event] += 1
        return due[event] <= WARNINGS_MAX

    async def _greet(self, connection: Connection) -> str:
        """The hello: who is it? Raises `LineRefused`."""
        if len(self._unknown) >= CONNECTIONS_UNKNOWN_MAX:
            raise LineRefused("too many connections that have not said hello")
        self._unknown.add(connection)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                line = await _read_line(connection)
        except TimeoutError:
            raise LineRefused(f"no hello within {HELLO_TIMEOUT_S:.0f} s") from None
        if line is None:
            raise ConnectionResetError("closed before its hello")
        fields = parse_object(line)
        if fields.get("type") != "hello":
            raise LineRefused("the first line must be a hello")
        if integer(fields, "version") != PROTOCOL_VERSION:
            raise LineRefused(f"this agent speaks version {PROTOCOL_VERSION}")
        pid = integer(fields, "pid")
        token = fields.get("token")
        attempt_id = self._find(token) if isinstance(token, str) else None
        if attempt_id is None:
            raise LineRefused("unknown token")
        registration = self._registrations[attempt_id]
        if len(registration.connections) >= CONNECTIONS_PER_ATTEMPT_MAX:
            raise LineRefused(f"more than {CONNECTIONS_PER_ATTEMPT_MAX} connections of one attempt")
        self._unknown.discard(connection)
        registration.join(connection, pid)
        known = ("sections", "saves", "leaving", *(() if self._slabs is None else ("slabs",)))
        welcome = {"type": "welcome", "version": PROTOCOL_VERSION, **dict.fromkeys(known, True)}
        connection.send(_encode(welcome))
        self._flush(registration, connection)
        self._on_message(attempt_id, TrainerHello(pid))
        return attempt_id

    def _find(self, token: str) -> str | None:
        """Whose token is it? Compared in constant time, each: it is all that keeps jobs apart."""
        wanted = token.encode(errors="replace")
        for attempt_id, registration in self._registrations.items():
            if hmac.compare_digest(registration.token.encode(), wanted):
                return attempt_id
        return None


async def _read_line(connection: Connection) -> bytes | None:
    """The next whole line; None at the end. Raises `LineRefused`."""
    try:
        return await connection.read_line()
    except LineTooLong:
        raise LineRefused(f"a line of more than {LINE_BYTES_MAX} bytes") from None


def _encode(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"
