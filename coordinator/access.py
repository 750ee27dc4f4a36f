"""Who may be a user of the fleet, and who a node.

Problem: a node's certificate is on a box on which other people's commands run; whoever gets it must
not have commands run everywhere. And a user's must not make a box of theirs a node, which is sent
other people's jobs with what stands in them.

How: who has the coordinator's own certificate may do everything, since that is what the coordinator
may; so one certificate for everything, on one machine, goes on. With `users` given, those names are
the users, and are no nodes. Without, who is named as a node of the fleet is no user, and that is
all that can be known: a name that no node has yet is anybody's. etcd and Kubernetes go by names in
certificates too; groups (their organisation) gRPC does not tell.
"""

import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coordinator.callers import HERE, Caller
from coordinator.transport import Tls


@dataclass(frozen=True, slots=True)
class Access:
    """`users`: patterns of names; `own`: the coordinator's certificate by now, as DER; `is_node`:
    whether a node has that name, as far as anybody knows."""

    users: tuple[str, ...] = ()
    own: Callable[[], bytes] = bytes
    is_node: Callable[[str], bool] = lambda _: False

    def refuse_user(self, caller: Caller) -> str:
        """Why it may neither submit jobs nor look at them; empty: it may."""
        if self._is_own(caller):
            return ""
        if self.users:
            if caller.is_any_of(self.users):
                return ""
            return (
                f"the certificate names {caller}, who is no user of this fleet: the coordinator's"
                " setting 'users' lists them"
            )
        node = next((one for one in caller.names if one not in HERE and self.is_node(one)), "")
        if not node:
            return ""
        return (
            f"the certificate names node {node}, and nodes run jobs and give none: use one that"
            " names a user alone, or list the user that it names as well in the coordinator's"
            " 'users'"
        )

    def refuse_node(self, caller: Caller, node: str) -> str:
        """Why it may not join as that node; empty: it may."""
        if node not in caller.names:
            return (
                f"the certificate names {caller}, not node {node}: give the agent one with the"
                " node's name as common name or DNS name"
            )
        if self._is_own(caller) or not Caller((node,)).is_any_of(self.users):
            return ""
        return (
            f"{node} is a user's name by the coordinator's setting 'users', and so no node's: give"
            " the agent a certificate and a name of its own"
        )

    def _is_own(self, caller: Caller) -> bool:
        own = self.own()
        return bool(own) and der_of(caller.pem) == own


def own_of(tls: Tls) -> Callable[[], bytes]:
    """The certificate that is in the file, read again when it is another one: who renews it renews
    what a user on this machine shows, too. While it cannot be read, the one of before."""
    known, der = tls.stamp(), der_of(Path(tls.cert_path).read_bytes())

    def own() -> bytes:
        nonlocal known, der
        before, known = known, tls.stamp()
        if known != before:
            with suppress(OSError):  # it is being replaced, and will have another stamp
                der = der_of(Path(tls.cert_path).read_bytes()) or der
        return der

    return own


def der_of(pem: bytes) -> bytes:
    """Of the first certificate; nothing where there is none."""
    end = "-----END CERTIFICATE-----"
    begun = pem.decode("ascii", "replace").partition("-----BEGIN CERTIFICATE-----")
    text = begun[1] + begun[2].partition(end)[0] + end
    try:
        return ssl.PEM_cert_to_DER_cert(text)
    except ValueError:
        return b""
