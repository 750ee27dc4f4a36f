"""A port of loopback that is nobody else's, whether somebody listens there or not.

Problem: a port that was found free, or that a server has left, is free for everybody: a server of
another test, in another process, may be given it a moment later, and answer where nobody should.

How: it stays bound while the test needs it. Connections to it are refused as to any at which nobody
listens. With SO_REUSEADDR, which servers set, one that names the port may listen there beside; one
that asks for any port is never given it.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_port() -> Iterator[int]:
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield int(keeper.getsockname()[1])
