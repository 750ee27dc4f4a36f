"""Who calls, by the certificate that is shown, and who is let into a service.

Problem: one authority signs for everybody in a fleet: nodes, users, scrapers. A service that asks
only whether a certificate is of that authority takes a job from a node, and hands a checkpoint to
whoever may read metrics. So services of ours are guarded, also those that come later: whoever calls
is refused, with a sentence, where `refuse` has one. Health and reflection are not.

The names of a certificate are its common name and its alternative names. Without TLS, which is
loopback alone, nobody has a name, and nobody is refused. The agent has the same file; a test
compares them.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

Context = grpc.aio.ServicerContext[Any, Any]
OURS = "baton.v1."  # the package of our services
# Every certificate for a program on this machine may have these, and they name nobody.
HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Caller:
    """The names in a certificate, and the certificate, in PEM."""

    names: tuple[str, ...]
    pem: bytes = b""

    def is_any_of(self, patterns: Sequence[str]) -> bool:
        """Whether it has one of these names; `*` stands for any part of one."""
        return any(fnmatchcase(name, one) for name in self.names for one in patterns)

    def __str__(self) -> str:
        return ", ".join(self.names) or "nobody"


def caller_of(context: Context) -> Caller | None:
    """`None` without TLS."""
    facts = context.auth_context()
    if b"ssl" not in facts.get("transport_security_type", []):
        return None
    found = [*facts.get("x509_common_name", []), *facts.get("x509_subject_alternative_name", [])]
    names = dict.fromkeys(name.decode("utf-8", "replace") for name in found)
    return Caller(tuple(names), b"".join(facts.get("x509_pem_cert", [])))


class Guard(grpc.aio.ServerInterceptor):
    """Of our services but for some, by their full names; `refuse` says why a caller is none of
    theirs, or nothing. It is asked at each call, since who is a node changes."""

    def __init__(self, refuse: Callable[[Caller], str], but_for: Sequence[str] = ()) -> None:
        self._refuse = refuse
        self._but_for = but_for

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        guarded = service.startswith(OURS) and service not in self._but_for
        return self._guarded(handler) if handler is not None and guarded else handler

    async def _check(self, context: Context) -> None:
        caller = caller_of(context)
        refusal = "" if caller is None else self._refuse(caller)
        if refusal:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)

    def _guarded(self, handler: Any) -> "Handler":
        """The same behind the check. What answers once is awaited, what streams is gone through."""
        once, stream = handler.unary_unary, handler.unary_stream
        once = once or handler.stream_unary
        stream = stream or handler.stream_stream

        async def answer(request: Any, context: Context) -> Any:
            await self._check(context)
            return await once(request, context)

        async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._check(context)
            async for response in stream(request, context):
                yield response

        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        made: Callable[..., Handler] = getattr(grpc, f"{kind}_rpc_method_handler")
        return made(
            answers if handler.response_streaming else answer,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
