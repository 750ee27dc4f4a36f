"""How this program listens and dials: in the clear on loopback, under mutual TLS everywhere else.

Problem: a port that takes jobs, which are commands for every node, must not face a network without
knowing who calls. Making TLS optional and documenting it fails: the quick test on 0.0.0.0 is the
installation a year later. So listening anywhere but on loopback is refused unless certificate, key
and authority are given, and then callers need a certificate from that authority as well. The files
are plain PEM, so any certificate authority serves. The agent has the same file, because neither
program may import the other; a test compares them.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

# A server that was restarted listens again within seconds, and callers pace their own tries. gRPC
# by itself refuses calls from memory for a second after the first failure, and for up to two
# minutes after more. The least of its pauses is its limit for a handshake as well, and those to
# another continent take longer than the first of ours.
_RECONNECT_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


class TransportError(Exception):
    """An address or a PEM file will not do; the text is a sentence that says what to change."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files: this program's certificate chain and key, and the authority that peers need."""

    cert_path: str
    key_path: str
    ca_path: str

    def stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Another one when the files are others; renewed certificates are known by it."""
        return tuple(_stamp(path) for path in (self.cert_path, self.key_path, self.ca_path))


def check_listen(address: str, tls: Tls | None) -> None:
    """Raises `TransportError` when `address`, host:port or unix:path, is open without TLS."""
    if tls is None and not _is_loopback(address):
        raise TransportError(
            f"listening on {address} needs mutual TLS: "
            "give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1"
        )


def listen(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    """Bind `server` to `address`; returns the port. Raises `TransportError`. Who connects is shown
    the certificate that is in the file by then."""
    check_listen(address, tls)
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _server_credentials(tls))
    except RuntimeError as error:
        raise TransportError(f"cannot listen on {address}: {_why(address, tls, error)}") from error


def _server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """They are asked at each connection, in a thread of gRPC's. What does not serve, as files that
    are half replaced, it does not take, and goes on with what it had; so does who is told `None`.
    """
    known = tls.stamp()

    def renewed() -> Any:  # the stubs know of no `None`
        nonlocal known
        before, known = known, tls.stamp()
        if known == before or None in known:
            return None
        return _configuration(tls)

    return grpc.dynamic_ssl_server_credentials(_configuration(tls), renewed, True)


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    pair = (_read(tls.key_path), _read(tls.cert_path))
    return grpc.ssl_server_certificate_configuration([pair], _read(tls.ca_path))


def open_channel(
    address: str, tls: Tls | None, options: Sequence[tuple[str, int | str]] = ()
) -> grpc.aio.Channel:
    """Connects on first use, and again 0.1 to 5 s after a failure unless `options` say otherwise.
    Raises `TransportError` for a file that cannot be read."""
    merged = tuple({**dict(_RECONNECT_OPTIONS), **dict(options)}.items())
    if tls is None:
        return grpc.aio.insecure_channel(address, merged)
    credentials = grpc.ssl_channel_credentials(
        _read(tls.ca_path), _read(tls.key_path), _read(tls.cert_path)
    )
    return grpc.aio.secure_channel(address, credentials, merged)


def _why(address: str, tls: Tls | None, error: RuntimeError) -> str:
    """gRPC says that it could not, and nothing of the reason; the system does when asked again."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as plain:
        if plain.errno == errno.EADDRINUSE:
            return "another program listens there already"
        return system_says(plain)
    except ValueError:  # its port is no number
        return str(error)
    return f"gRPC does not take {tls.cert_path} with its key" if tls else str(error)


def system_says(error: OSError) -> str:
    """Why somebody cannot listen. Python and asyncio add the address to the text of an error of the
    system, but not of a name's."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 else error.strerror or str(error)


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost" or address.startswith(("unix:", "unix-abstract:")):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # it is being replaced; whoever reads it says what is wrong
    # Not when its bytes changed: one that may be read at last (`chown`) is another one, too.
    return found.st_ino, found.st_size, found.st_ctime_ns


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TransportError(f"cannot read {path}: {error.strerror}") from error
