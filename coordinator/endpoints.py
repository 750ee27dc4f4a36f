"""Whom the coordinator calls: whether what an operator says of them can be.

Problem: a collector or a webhook with a wrong address is noticed weeks later, by what is missing.
So what can be seen of one without calling it is said at the start, in a sentence; and a password in
an address would stand in every place where settings are shown, so there is none.
"""

import importlib.util
from typing import Final
from urllib.parse import urlsplit

from coordinator.sources import address_problem

OTLP_MODULE: Final = "opentelemetry.exporter.otlp.proto.http"
SCHEMES: Final = ("http", "https")
URL_CHARACTERS_MAX: Final = 2_048  # servers refuse longer ones


def otel_problem(endpoint: str) -> str | None:
    scheme, _, address = endpoint.partition("://")
    if scheme not in SCHEMES or address_problem("otel_endpoint", address, port_min=1):
        return (
            "'otel_endpoint' must be http://HOST:PORT or https://HOST:PORT, without a path, "
            f"not '{endpoint}'"
        )
    try:
        found = importlib.util.find_spec(OTLP_MODULE)
    except ModuleNotFoundError:
        found = None
    if found is None:
        return (
            "'otel_endpoint' is set, but what exports spans is not installed here: "
            "`pip install 'gpu-baton[otel]'`, or leave it empty"
        )
    return None


def webhook_problem(name: str, url: str) -> str | None:
    """As a sentence without the address, whose path may be a secret."""
    form = f"'{name}' must be http://HOST[:PORT]/PATH or https://HOST[:PORT]/PATH"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return f"{form}; its host or port is none"
    if parts.scheme not in SCHEMES or not parts.hostname or port == 0:
        return form
    if parts.username is not None or parts.password is not None:
        return f"{form}, without a user and a password"
    plain = url.isascii() and url.isprintable() and " " not in url
    if not plain or parts.fragment or len(url) > URL_CHARACTERS_MAX:
        return f"{form}, {URL_CHARACTERS_MAX} characters at most, without spaces and fragment"
    return None
