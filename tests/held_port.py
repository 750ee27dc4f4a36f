"""A port on loopback for a program that is yet to listen on it, and that nobody else gets.

Problem: whoever asks for a free port, lets it go and hands on its number leaves it to the next one
who asks, and four workers ask all the time. So it is kept until it is used no more, by a socket
that is bound and does not listen: who asks for any port, or connects, gets another one, and who
names this one may listen on it, if it too says SO_REUSEADDR, as servers do.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

HOST = "127.0.0.1"


@contextmanager
def held_port() -> Iterator[int]:
    """Its number, kept for as long as the block."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        yield holder.getsockname()[1]
