"""TLS for the HTTP beside gRPC: the same three PEM files, and the same rule that both sides show a
certificate from the fleet's authority.

Problem: Python's ready-made contexts are for browsers and web servers: they trust every public
authority, let callers come without a certificate, and from Python 3.13 on demand certificate
extensions that gRPC does not. One set of files has to serve both ports, so both ask for the same.
"""

import ssl
from pathlib import Path

from agent.transport import Tls, TransportError


def context(protocol: int, tls: Tls) -> ssl.SSLContext:
    """Of `ssl.PROTOCOL_TLS_SERVER`: nobody without a certificate gets in. Of
    `ssl.PROTOCOL_TLS_CLIENT`: the server's certificate must carry the name that was dialled. Raises
    `TransportError`."""
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.verify_mode = ssl.CERT_REQUIRED
    for path in (tls.ca_path, tls.key_path, tls.cert_path):
        # OpenSSL's own error does not say which file it was.
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise TransportError(f"cannot read {path}: {error.strerror}") from error
    try:
        made.load_verify_locations(tls.ca_path)
        made.load_cert_chain(tls.cert_path, tls.key_path)
    except ssl.SSLError as error:
        files = f"{tls.cert_path}, {tls.key_path} and {tls.ca_path}"
        raise TransportError(f"no TLS with {files}: {error.reason or error}") from error
    return made
