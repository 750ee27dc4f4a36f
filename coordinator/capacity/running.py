"""Other people's programs: started, listened to, and ended with all that they have started.

Problem: a site's script hangs in ssh, prints a gigabyte, or leaves something in the background that
keeps its output open. So a program runs in a process group of its own, which is killed as a whole
when nobody waits any more; of what it prints the end is kept, within a bound; and its exit is its
end, whatever still holds the pipe. What it leaves running then goes on (a script may well hand its
work to the background), and can go on printing, which is read and dropped.

Its environment is small and the same everywhere: what an administrator's shell happens to have is
nothing that a service may rely on.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coordinator.capacity.driver import CapacityError

OUTPUT_BYTES_MAX: Final = 4_096  # the end of it: there stands why
REASON_CHARACTERS_MAX: Final = 300  # of that in a sentence
READ_BYTES: Final = 65_536  # all that a pipe holds
ENVIRONMENT: Final[Mapping[str, str]] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}


@dataclass(frozen=True, slots=True)
class Finished:
    """A program's end: its exit status (negative: the signal that ended it), and the end of what it
    printed."""

    status: int
    output: str


@dataclass(slots=True)
class _Output:
    descriptor: int
    bytes_max: int
    tail: bytearray = field(default_factory=bytearray)

    def take(self) -> None:
        """What there is, of which the end is kept; after the last byte the pipe is closed."""
        try:
            got = os.read(self.descriptor, READ_BYTES)
        except BlockingIOError:
            return
        self.tail += got
        del self.tail[: -self.bytes_max]
        if not got:
            asyncio.get_running_loop().remove_reader(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1


async def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    output_bytes_max: int = OUTPUT_BYTES_MAX,
) -> Finished:
    """Until `command` has ended. Raises `CapacityError` where it cannot be started. Cancelled, it
    kills the program and all of its process group."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            env={**ENVIRONMENT, **environment},
            start_new_session=True,
        )
    except OSError as error:
        os.close(reading)
        raise CapacityError(f"{command[0]} cannot be started: {error.strerror}") from error
    finally:
        os.close(writing)
    output = _Output(reading, output_bytes_max)
    asyncio.get_running_loop().add_reader(reading, output.take)
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if output.descriptor >= 0:
        output.take()
    return Finished(status, output.tail.decode("utf-8", "replace").strip())


async def succeed(
    command: Sequence[str],
    environment: Mapping[str, str],
    output_bytes_max: int = OUTPUT_BYTES_MAX,
) -> str:
    """The same for a program whose exit status must be 0; what it printed. Raises `CapacityError`
    with the end of that."""
    finished = await run(command, environment, output_bytes_max)
    if finished.status == 0:
        return finished.output
    how = (
        f"was ended by signal {-finished.status}"
        if finished.status < 0
        else f"exited with status {finished.status}"
    )
    raise CapacityError(f"{command[0]} {how}{said(finished.output)}")


def said(output: str) -> str:
    """The end of what a program printed as the rest of a sentence, in one line."""
    line = " ".join(output.split())
    if not line:
        return ""
    cut = line[-REASON_CHARACTERS_MAX:]
    return f": {'' if cut == line else '...'}{cut}"
