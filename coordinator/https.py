"""TLS for the HTTP beside gRPC: the same three PEM files, and the same rule that callers show a
certificate from the fleet's authority.

Problem: Python's ready-made contexts are for web servers: they let callers come without a
certificate, and from Python 3.13 on demand certificate extensions that gRPC does not. One set of
files has to serve both ports, so both ask for the same. (The agent's is `agent/chunks/https.py`.)
"""

import ssl
from pathlib import Path

from coordinator.transport import Tls, TransportError


def server_context(tls: Tls) -> ssl.SSLContext:
    """Nobody without a certificate gets in. Raises `TransportError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    for path in (tls.ca_path, tls.key_path, tls.cert_path):
        # OpenSSL's own error does not say which file it was.
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise TransportError(f"cannot read {path}: {error.strerror}") from error
    try:
        context.load_verify_locations(tls.ca_path)
        context.load_cert_chain(tls.cert_path, tls.key_path)
    except ssl.SSLError as error:
        files = f"{tls.cert_path}, {tls.key_path} and {tls.ca_path}"
        raise TransportError(f"no TLS with {files}: {error.reason or error}") from error
    return context
