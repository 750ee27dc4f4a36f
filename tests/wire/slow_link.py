"""A link on which a handshake takes long: to another continent, or to an emulated machine."""

import contextlib
import socket
import threading
from collections.abc import Iterator

LATE_S = 0.5  # a handshake of TLS by satellite; five times the pause between tries
PIECE_BYTES = 1 << 16


@contextlib.contextmanager
def slow_link(address: str) -> Iterator[str]:
    """Where whoever listens at `address` answers each new connection late."""
    host, port = address.rsplit(":", 1)
    kept: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return  # the test is over
            far = socket.create_connection((host, int(port)))
            kept.extend((near, far))
            for ends in ((near, far, 0.0), (far, near, LATE_S)):
                threading.Thread(target=_carry, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()
            for end in kept:
                end.close()


def _carry(source: socket.socket, target: socket.socket, late_s: float) -> None:
    """Everything from one to the other, the first of it late."""
    threading.Event().wait(late_s)
    try:
        while piece := source.recv(PIECE_BYTES):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return  # one of them has gone
