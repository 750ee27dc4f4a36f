"""TLS for the HTTP beside gRPC: the same three PEM files, and the same rule that both sides show a
certificate from the fleet's authority.

Problem: Python's ready-made contexts are for browsers and web servers: they trust every public
authority, let callers come without a certificate, and from Python 3.13 on demand certificate
extensions that gRPC does not. One set of files has to serve both ports, so both ask for the same.
"""

import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.transport import Tls, TransportError

FLIGHTS = 3  # of a handshake, each way
# gRPC's own library, BoringSSL, shakes hands with these keys alone: how they begin in a certificate
# (RFC 3279, RFC 5480). OpenSSL takes others as well, Ed25519 and P-521 among them.
TAKEN_KEYS = (
    bytes.fromhex("06092a864886f70d010101"),  # RSA
    bytes.fromhex("06072a8648ce3d020106082a8648ce3d030107"),  # P-256
    bytes.fromhex("06072a8648ce3d020106052b81040022"),  # P-384
)


class TooWeakError(TransportError):
    """A short key or an old hash, which gRPC takes and OpenSSL does not."""


def context(protocol: int, tls: Tls) -> ssl.SSLContext:
    """Of `ssl.PROTOCOL_TLS_SERVER`: nobody without a certificate gets in. Of
    `ssl.PROTOCOL_TLS_CLIENT`: the server's certificate must carry the name that was dialled. Raises
    `TransportError`."""
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an authority below a root, as in gRPC
    for path in (tls.ca_path, tls.key_path, tls.cert_path):
        # OpenSSL's own error does not say which file it was.
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise TransportError(f"cannot read {path}: {error.strerror}") from error
    try:
        made.load_verify_locations(tls.ca_path)
    except ssl.SSLError as error:
        raise TransportError(f"{tls.ca_path} has no certificate in PEM") from error
    try:
        # With a password OpenSSL would ask for it at the terminal.
        made.load_cert_chain(tls.cert_path, tls.key_path, password="")
    except ssl.SSLError as error:
        if "_TOO_" in (error.reason or ""):  # EE_KEY_TOO_SMALL, CA_MD_TOO_WEAK
            raise TooWeakError(f"{tls.cert_path}, by OpenSSL: {error.reason}") from error
        if error.reason == "KEY_VALUES_MISMATCH":
            said = f"{tls.key_path} is not the key of the certificate in {tls.cert_path}"
        else:
            said = (
                f"{tls.cert_path} is no certificate, or {tls.key_path} no key without a password, "
                "in PEM"
            )
        raise TransportError(said) from error
    return made


def renewing(tls: Tls) -> ssl.SSLContext:
    """For a server: whoever connects is shown, and judged by, what is in the files by then; while
    they do not serve, because they are half replaced, by what was there before.

    A session that is taken up again is not judged: its caller would outlive his authority in the
    file. So there are none in TLS 1.3; in 1.2, where Python cannot forbid them, those end that may
    be of before a renewal, and a library that sees one end begins a new one (RFC 5246, 7.2.2).
    """
    at_first = used = context(ssl.PROTOCOL_TLS_SERVER, tls)
    known = tls.stamp()

    def choose(
        connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext
    ) -> ssl.AlertDescription | None:
        nonlocal used, known
        before, known = known, tls.stamp()
        if known != before:
            used = _other(tls) or used
        connection.context = used
        resumed = connection.session_reused and used is not at_first
        return ssl.AlertDescription.ALERT_DESCRIPTION_ACCESS_DENIED if resumed else None

    first = context(ssl.PROTOCOL_TLS_SERVER, tls)
    first.sni_callback = choose
    first.num_tickets = 0
    first.options |= ssl.OP_NO_TICKET
    return first


def _other(tls: Tls) -> ssl.SSLContext | None:
    try:
        return context(ssl.PROTOCOL_TLS_SERVER, tls)
    except TransportError:
        return None


@dataclass(frozen=True, slots=True)
class Judged:
    """`doubt`: why peers that trust the same authority would refuse this certificate: it has
    expired, say. Empty when they would not; then `expiring` is the first file that will not do any
    more, and `expires_unix_s` when."""

    doubt: str = ""
    expiring: str = ""
    expires_unix_s: float = 0.0


def doubt(tls: Tls, *, serves: bool = True) -> str:
    """As in `judge`."""
    return judge(tls, serves=serves).doubt


def judge(tls: Tls, *, serves: bool = True) -> Judged:
    """`serves`: the certificate is shown to callers too, not only when calling; else it is not
    asked when it expires.

    gRPC binds to a port with any certificate, and who calls hears of a broken connection. Raises
    `TransportError` for files that do not serve at all.
    """
    try:
        server = context(ssl.PROTOCOL_TLS_SERVER, tls)
        client = context(ssl.PROTOCOL_TLS_CLIENT, tls)
    except TooWeakError as error:
        return Judged(str(error))
    client.check_hostname = False
    if not serves:
        client.verify_mode = ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True))
    for end in ends * FLIGHTS:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or str(error)
            return Judged(f"{tls.cert_path}, by {tls.ca_path}: {why}")
    shown = ends[0].getpeercert(binary_form=True) or b""
    if not any(key in shown for key in TAKEN_KEYS):
        return Judged(
            f"{tls.cert_path}, by gRPC: its key is neither RSA nor ECDSA on P-256 or P-384"
        )
    own_s = _end_s(ends[0].getpeercert())
    # Of several authorities the old ones may have expired.
    authority_s = max(map(_end_s, client.get_ca_certs()), default=own_s)
    first_s, file = min((own_s, tls.cert_path), (authority_s, tls.ca_path))
    return Judged("", file, first_s)


def _end_s(certificate: Mapping[str, Any] | None) -> float:
    """Never, of one that was not verified."""
    end = (certificate or {}).get("notAfter")
    return ssl.cert_time_to_seconds(end) if isinstance(end, str) else math.inf
