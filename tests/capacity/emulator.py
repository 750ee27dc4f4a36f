"""A Redfish service over HTTP: sushy-tools' emulator with its fake systems, on this test's clock.

What it says is the emulator's own; what stands before it can hang, swallow a reset, or refuse it,
counts the resets, asks for a password as the emulator does, and may offer sessions, which the
emulator does not have. One request at a time goes through to the emulator: two first ones at once
both make its databases, and SQLite refuses one of them without waiting. Its fake systems take some
seconds to change: by the clock that the test moves.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import bcrypt
import pytest
from sushy_tools.emulator import main as emulator
from sushy_tools.emulator.resources.systems import fakedriver
from werkzeug.serving import make_server

USER: Final = "baton"
PASSWORD: Final = "correct horse"
SESSIONS: Final = "/redfish/v1/SessionService/Sessions"
TOKEN: Final = "a-token-of-the-service"

Start = Callable[..., Any]


class Service:
    """`resets`: the kinds that were asked for, of any system. `requests`: method, path, and how it
    was authenticated."""

    def __init__(self, folder: Path, *, has_sessions: bool) -> None:
        self.wrong = ""
        self.resets: list[str] = []
        self.requests: list[tuple[str, str, str]] = []
        self.sessions = 0
        self.port = 0
        self.deaf = False
        self._has_sessions = has_sessions
        self._ended = threading.Event()
        self._turn = threading.Lock()
        path = folder / "htpasswd"
        digest = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
        path.write_text(f"{USER}:{digest}\n")
        self._open = emulator.app
        self._guarded = emulator.RedfishAuthMiddleware(emulator.app, str(path))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        self._ended.set()

    def __call__(self, environment: dict[str, Any], start: Start) -> Iterable[bytes]:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        has_token = environment.get("HTTP_X_AUTH_TOKEN") == TOKEN and self.sessions > 0
        how = "token" if has_token else environment.get("HTTP_AUTHORIZATION", "")[:5]
        self.requests.append((method, path, how))
        if self._has_sessions and path.rstrip("/") in ("/redfish/v1", SESSIONS):
            return self._sessions(environment, start)
        if self._has_sessions and path == f"{SESSIONS}/1" and method == "DELETE" and has_token:
            self.sessions -= 1
            return _answer(start, "204 No Content")
        if method == "POST":
            body = environment["wsgi.input"].read(int(environment["CONTENT_LENGTH"]))
            kind = json.loads(body)["ResetType"]
            self.resets.append(kind)
            if self.wrong == "hang":
                self._ended.wait()
            if self.wrong == "fail":
                message = {"error": {"message": "the chassis\nis open"}}
                return _answer(start, "500 Internal Server Error", message)
            if self.wrong == "lie" or (self.deaf and kind == "GracefulShutdown"):
                return _answer(start, "204 No Content")
            environment["wsgi.input"] = _Again(body)
        app = self._open if has_token else self._guarded
        with self._turn:
            answer: Iterable[bytes] = app(environment, start)
        return answer

    def _sessions(self, environment: dict[str, Any], start: Start) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] == "GET":
            return _answer(start, "200 OK", {"Links": {"Sessions": {"@odata.id": SESSIONS}}})
        given = json.loads(environment["wsgi.input"].read(int(environment["CONTENT_LENGTH"])))
        if given != {"UserName": USER, "Password": PASSWORD}:
            return _answer(start, "401 Unauthorized", {})
        self.sessions += 1
        headers = (("X-Auth-Token", TOKEN), ("Location", f"{self.url}{SESSIONS}/1"))
        return _answer(start, "201 Created", {}, headers)


class _Again:
    """A body that has been read."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def read(self, size: int = -1) -> bytes:
        body, self._body = self._body, b""
        return body


def _answer(
    start: Start, status: str, body: object = None, headers: Iterable[tuple[str, str]] = ()
) -> Iterable[bytes]:
    raw = b"" if body is None else json.dumps(body).encode()
    length = ("Content-Length", str(len(raw)))
    start(status, [*headers, ("Content-Type", "application/json"), length])
    return [raw]


@contextmanager
def serving(
    folder: Path,
    systems: Iterable[str],
    now_s: Callable[[], float],
    *,
    has_sessions: bool = False,
    tls: Any = None,
) -> Iterator[Service]:
    """An emulated service with a fake system of each name, which is off."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakedriver, "time", SimpleNamespace(time=now_s))
        patch.setattr(emulator.app, "_cache", {}, raising=False)
        patch.setattr(
            emulator.app,
            "config",
            {
                **emulator.app.config,
                "SUSHY_EMULATOR_FAKE_DRIVER": True,
                "SUSHY_EMULATOR_STATE_DIR": str(folder),
                "SUSHY_EMULATOR_FAKE_SYSTEMS": [
                    {"uuid": name, "name": f"name of {name}", "power_state": "Off", "nics": []}
                    for name in systems
                ],
            },
        )
        service = Service(folder, has_sessions=has_sessions)
        server = make_server("127.0.0.1", 0, service, threaded=True, ssl_context=tls)
        service.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield service
        finally:
            service.end()
            server.shutdown()
            thread.join()
            server.server_close()
