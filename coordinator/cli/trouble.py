"""Why the coordinator is not reached, in words that say what to do.

Problem: gRPC says what its library saw, in the library's words: a socket that was closed, an error
by its number. Who reads that wants to know whether the coordinator is down, the name is wrong, or a
certificate has expired, and whose. What the other side did not like about our own certificate it
does not tell at all; that is found out here, from the files.
"""

import re

_KNOWN_TROUBLE = (
    (re.compile(r"connection refused", re.IGNORECASE), "connection refused; is it running? see"),
    (
        re.compile(r"errors resolving|name not found", re.IGNORECASE),
        "the name does not resolve; see",
    ),
    (
        re.compile(r"certificate has expired", re.IGNORECASE),
        "the coordinator's certificate, or an authority of it, has expired; it is to be renewed"
        " there (its tls_cert). Otherwise see",
    ),
    (
        re.compile(r"certificate is not yet valid", re.IGNORECASE),
        "the coordinator's certificate is not valid yet; is this machine's clock right? see",
    ),
    (
        re.compile(r"handshake|certificate|ssl|tls", re.IGNORECASE),
        "the TLS handshake failed; see --tls-cert, --tls-key, --tls-ca and",
    ),
    (re.compile(r"no route|unreachable", re.IGNORECASE), "no route to it; see"),
    (
        re.compile(r"closed|reset|goaway", re.IGNORECASE),
        "the connection broke; does it restart, or want TLS? see --tls-cert and",
    ),
)

# There was somebody, who ended it.
_BROKEN_OFF = re.compile(r"handshake|certificate|ssl|tls|closed|reset|goaway", re.IGNORECASE)


def in_words(details: str, doubt: str) -> str:
    """`details` is gRPC's text; `doubt` what is known against our own certificate, if anything."""
    known = next((said for pattern, said in _KNOWN_TROUBLE if pattern.search(details)), None)
    said = known or f"{details}; see"
    if doubt and _BROKEN_OFF.search(details):
        renew = "renew your certificate" if "expired" in doubt else "the TLS handshake failed"
        said = f"{renew}; see --tls-cert, --tls-key, --tls-ca and"
    return f"{said} --coordinator{f' ({doubt})' if doubt else ''}"
