"""Nodes are switched by their management controllers over Redfish (DMTF DSP0266, DSP2046).

Problem: a BMC is a small and slow computer with a password that opens everything. So:

- TLS always, with its certificate verified (`ca_file` where it has one of its own); plain HTTP only
  to this machine. Redirects are not followed, and paths in answers must lie on the same BMC: a
  token never goes elsewhere.
- A session where the service offers one, ended after use, since BMCs have few; else Basic.
- Each request has a deadline and each answer a bound.
- What is as ordered already is left alone. Off is GracefulShutdown with a bound, then ForceOff;
  what a system does not allow is not asked for.
"""

import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from urllib.parse import quote, urlsplit

import aiohttp
import orjson

from coordinator.capacity import credentials
from coordinator.capacity.driver import CapacityError, State, is_resume, reverse
from coordinator.capacity.graceful import switch_off
from coordinator.core.capacity_orders import CapacityOrder
from coordinator.ports import Clock

ROOT: Final = "/redfish/v1/"
SYSTEMS: Final = "/redfish/v1/Systems"
RESET: Final = "#ComputerSystem.Reset"
ALLOWED: Final = "ResetType@Redfish.AllowableValues"
REQUEST_S: Final = 30.0  # for one answer; slow BMCs need ten
ANSWER_BYTES_MAX: Final = 1 << 20  # a system's description has some ten kilobytes
READ_BYTES: Final = 1 << 16
MESSAGE_CHARACTERS_MAX: Final = 200
# On its way is not there.
STATES: Final = {
    "On": State.ON,
    "Off": State.OFF,
    "PoweringOn": State.OFF,
    "PoweringOff": State.ON,
    "Paused": State.ON,
}


@dataclass(frozen=True, slots=True)
class Redfish:
    """`address_of` a node: https://HOST[:PORT] of its BMC. `system`: which of its systems, with
    `{node}` for the node's name; empty where there is one. `authentication`: session or basic."""

    address_of: Callable[[str], str]
    credentials_file: str
    graceful_ms: int
    clock: Clock
    system: str = ""
    authentication: str = "session"
    ca_file: str = ""
    takes_lists: bool = False

    def plan(self, order: CapacityOrder) -> list[str]:
        off = "GracefulShutdown, and ForceOff if need be"
        words = "On" if is_resume("redfish", order) else off
        return [f"ask {self.address_of(node)} of {node} for {words}" for node in order.nodes]

    async def state(self, nodes: Sequence[str]) -> Mapping[str, State]:
        found = {}
        for node in nodes:
            async with self._open(node) as bmc:
                found[node] = _state(await bmc.get(await self._system(bmc, node)))
        return found

    async def apply(self, order: CapacityOrder) -> None:
        wanted = State.ON if is_resume("redfish", order) else State.OFF
        for node in order.nodes:
            async with self._open(node) as bmc:
                path = await self._system(bmc, node)
                system = await bmc.get(path)
                if _state(system) is wanted:
                    continue
                if wanted is State.ON:
                    await _reset(bmc, system, "On", "ForceOn")
                    continue
                await switch_off(
                    partial(_reset, bmc, system, "GracefulShutdown"),
                    partial(_reset, bmc, system, "ForceOff"),
                    partial(_is_off, bmc, path),
                    self.clock,
                    self.graceful_ms,
                )

    async def roll_back(self, order: CapacityOrder) -> None:
        await self.apply(reverse(order))

    async def _system(self, bmc: "_Bmc", node: str) -> str:
        if self.system:
            return f"{SYSTEMS}/{quote(self.system.replace('{node}', node), safe='')}"
        members = (await bmc.get(SYSTEMS)).get("Members")
        if not isinstance(members, list) or len(members) != 1:
            count = len(members) if isinstance(members, list) else 0
            raise bmc.error(f"has {count} systems; say which is meant with 'system'")
        return bmc.path(_within(members[0], "@odata.id"))

    @asynccontextmanager
    async def _open(self, node: str) -> AsyncIterator["_Bmc"]:
        login = credentials.read(self.credentials_file, node)
        try:
            tls = ssl.create_default_context(cafile=self.ca_file or None)
        except OSError as error:  # of which ssl.SSLError is one
            raise CapacityError(f"{self.ca_file} is no certificate authority: {error}") from error
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, force_close=True),
            timeout=aiohttp.ClientTimeout(total=REQUEST_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as http:
            bmc = _Bmc(http, node, self.address_of(node).rstrip("/"))
            await bmc.enter(login, self.authentication)
            try:
                yield bmc
            finally:
                with contextlib.suppress(CapacityError):
                    await bmc.leave()


@dataclass(slots=True)
class _Bmc:
    """One controller, while it is talked to. `session`: the path to end it with."""

    http: aiohttp.ClientSession
    node: str
    address: str
    headers: dict[str, str] = field(default_factory=dict)
    session: str = ""

    async def enter(self, login: credentials.Login, authentication: str) -> None:
        sessions = ""
        if authentication == "session":
            sessions = _within(await self.get(ROOT), "Links", "Sessions", "@odata.id")
        if not sessions:
            pair = base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
            self.headers = {"Authorization": f"Basic {pair}"}
            return
        body = {"UserName": login.user, "Password": login.password}
        headers = await self._ask("POST", self.path(sessions), body, {})
        self.headers = {"X-Auth-Token": headers.get("X-Auth-Token", "")}
        # The standard allows an absolute address; only its path is used.
        self.session = urlsplit(headers.get("Location", "")).path

    async def leave(self) -> None:
        if self.session:
            await self._ask("DELETE", self.path(self.session), None, {})

    async def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        await self._ask("GET", path, None, found)
        return found

    async def post(self, path: str, body: Mapping[str, str]) -> None:
        await self._ask("POST", path, body, {})

    def path(self, path: str) -> str:
        """A path from an answer. Raises `CapacityError` for what could lead elsewhere."""
        if not path.startswith("/") or path.startswith("//"):
            raise self.error(f"names '{path[:80]}', which is no path on it")
        return path

    def error(self, sentence: str) -> CapacityError:
        return CapacityError(f"the BMC of {self.node} at {self.address} {sentence}")

    async def _ask(
        self, method: str, path: str, body: object, answer: dict[str, Any]
    ) -> Mapping[str, str]:
        """Fills `answer`, and returns the headers. Raises `CapacityError`."""
        try:
            async with self.http.request(
                method,
                self.address + path,
                json=body,
                headers={"Accept": "application/json", **self.headers},
                allow_redirects=False,
            ) as response:
                raw = bytearray()
                async for part in response.content.iter_chunked(READ_BYTES):
                    raw += part
                    if len(raw) > ANSWER_BYTES_MAX:
                        raise self.error(f"answers with more than {ANSWER_BYTES_MAX} bytes")
        except TimeoutError as error:
            raise self.error(f"does not answer within {REQUEST_S:g} s") from error
        except aiohttp.ClientError as error:
            raise self.error(f"cannot be asked: {error}") from error
        answer.update(_document(bytes(raw)))
        if response.status == 401:
            raise self.error("refuses the user and password of credentials_file")
        if not 200 <= response.status < 300:
            raise self.error(f"answers {method} {path} with {response.status}{_message(answer)}")
        return response.headers


async def _reset(bmc: _Bmc, system: Mapping[str, Any], *kinds: str) -> None:
    """By the first of `kinds` that the system allows; where it does not say, by the first."""
    actions = system.get("Actions")
    action = actions.get(RESET) if isinstance(actions, dict) else None
    if not isinstance(action, dict):
        raise bmc.error(f"has no {RESET}")
    allowed = action.get(ALLOWED)
    if not isinstance(allowed, list):
        allowed = list(kinds)
    kind = next((kind for kind in kinds if kind in allowed), None)
    if kind is None:
        raise bmc.error(f"allows no {' or '.join(kinds)}, only {', '.join(map(str, allowed))}")
    await bmc.post(bmc.path(_within(action, "target")), {"ResetType": kind})


async def _is_off(bmc: _Bmc, path: str) -> bool:
    return _state(await bmc.get(path)) is State.OFF


def _state(system: Mapping[str, Any]) -> State:
    return STATES.get(_within(system, "PowerState"), State.UNKNOWN)


def _within(document: Any, *keys: str) -> str:
    """The text at `keys`; empty where there is none."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document if isinstance(document, str) else ""


def _document(raw: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(answer: Mapping[str, Any]) -> str:
    text = " ".join(_within(answer, "error", "message").split())
    return f": {text[:MESSAGE_CHARACTERS_MAX]}" if text else ""
