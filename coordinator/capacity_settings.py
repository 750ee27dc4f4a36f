"""The tables `[capacity.NAME]` of the configuration: which nodes are switched by which driver.

Problem: a fleet has several kinds of boxes, each with its own way to be switched on; and a wrong
line here switches off the wrong machine, or shows a password to whoever reads a configuration. So
each node belongs to one group, each group has one driver with the fields that this driver has and
no others, and secrets are in a file of their own that only this service can read.
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from coordinator.capacity import hostlist
from coordinator.sources import address_problem, choice_problem, path_problem, range_problem

GROUP_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
GROUPS_MAX: Final = 1_000  # a fleet has a handful
DEADLINE_MS_MIN: Final = 1_000  # less, and a busy BMC is always late
DEADLINE_MS_MAX: Final = 7_200_000  # two hours; who takes longer to be switched is broken
GPUS_PER_NODE_MAX: Final = 64  # a rented node has 16 at most
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
MAC: Final = re.compile(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}")
AUTHENTICATIONS: Final = ("session", "basic")

# What each driver needs, and what it may have besides; every group has nodes, driver, deadline_ms.
NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "programs": ("resume_program", "suspend_program"),
    "redfish": ("address", "credentials_file"),
    "ipmi": ("address", "credentials_file"),
    "wake": ("addresses", "suspend_program"),
    "burst": ("create_program", "delete_program", "gpu_type", "gpus_per_node"),
    "simulated": (),
}
OPTIONAL: Final[Mapping[str, tuple[str, ...]]] = {
    "programs": ("resume_fail_program", "state_program"),
    "redfish": ("addresses", "system", "authentication", "ca_file", "graceful_ms"),
    "ipmi": ("addresses", "graceful_ms"),
    "wake": ("broadcast", "state_program"),
    "burst": ("state_program",),
    "simulated": (),
}
COMMON: Final = ("nodes", "driver", "deadline_ms")
# They may begin with $CREDENTIALS_DIRECTORY, as the TLS files may.
CREDENTIAL_FIELDS: Final = ("credentials_file", "ca_file")
PATHS: Final = (
    "resume_program suspend_program resume_fail_program state_program create_program "
    "delete_program credentials_file ca_file"
).split()


class CapacityGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nodes and how they are switched (docs/capacity.md). `address` is where a node's controller
    is, with `{node}` for its name; `addresses` are those of single nodes that differ from it.
    `gpu_type` and `gpus_per_node` are what a rented node has."""

    nodes: str = ""
    driver: str = ""
    deadline_ms: int = 600_000
    resume_program: str = ""
    suspend_program: str = ""
    resume_fail_program: str = ""
    state_program: str = ""
    create_program: str = ""
    delete_program: str = ""
    address: str = ""
    addresses: dict[str, str] = msgspec.field(default_factory=dict)
    system: str = ""
    authentication: str = "session"
    credentials_file: str = ""
    ca_file: str = ""
    graceful_ms: int = 120_000
    broadcast: str = "255.255.255.255:9"
    gpu_type: str = ""
    gpus_per_node: int = 0

    def names(self) -> list[str]:
        """Its nodes. Raises `ValueError`."""
        return hostlist.read(self.nodes)

    def address_of(self, node: str) -> str:
        return self.addresses.get(node) or self.address.replace("{node}", node)


def capacity_problems(groups: Mapping[str, CapacityGroup]) -> list[str]:
    """What is wrong with the tables, as sentences; none shows a secret."""
    found = []
    if len(groups) > GROUPS_MAX:
        found.append(f"'capacity' has {len(groups)} tables; at most {GROUPS_MAX} may be")
    owner: dict[str, str] = {}
    for name, group in groups.items():
        if not GROUP_NAME.fullmatch(name):
            found.append(f"'{name}' in 'capacity' must be 1 to 64 of a-z, 0-9 and '-'")
        found += [f"'{name}' in 'capacity': {sentence}" for sentence in _group_problems(group)]
        try:
            nodes = group.names()
        except ValueError:
            continue
        both = next((node for node in nodes if node in owner), None)
        if both is not None:
            found.append(f"'{name}' and '{owner[both]}' in 'capacity' both have the node {both}")
        owner.update(dict.fromkeys(nodes, name))
    rented: dict[str, str] = {}
    for name, group in groups.items():
        if group.gpu_type in rented:
            both = f"'{name}' and '{rented[group.gpu_type]}' in 'capacity'"
            found.append(f"{both} both rent {group.gpu_type}; one group holds all names of a type")
        elif group.gpu_type:
            rented[group.gpu_type] = name
    return found


def _group_problems(group: CapacityGroup) -> list[str]:
    wrong = choice_problem("driver", group.driver, tuple(NEEDED))
    if wrong:
        return [wrong]
    found = [
        _nodes_problem(group),
        range_problem("deadline_ms", group.deadline_ms, DEADLINE_MS_MIN, DEADLINE_MS_MAX),
        choice_problem("authentication", group.authentication, AUTHENTICATIONS),
        address_problem("broadcast", group.broadcast, port_min=1),
        range_problem("gpus_per_node", group.gpus_per_node, 0, GPUS_PER_NODE_MAX),
    ]
    has = set(COMMON) | set(NEEDED[group.driver]) | set(OPTIONAL[group.driver])
    defaults = CapacityGroup()
    for name in CapacityGroup.__struct_fields__:
        value = getattr(group, name)
        if value != getattr(defaults, name) and name not in has:
            found.append(f"the driver '{group.driver}' has no '{name}'")
    for name in NEEDED[group.driver]:
        if not getattr(group, name) and not (name == "address" and group.addresses):
            found.append(f"the driver '{group.driver}' needs '{name}'")
    found += [path_problem(name, path) for name in PATHS if (path := getattr(group, name))]
    if "graceful_ms" in has and not 0 <= group.graceful_ms < group.deadline_ms:
        found.append(
            f"'graceful_ms' must be 0 to less than deadline_ms ({group.deadline_ms}), which holds "
            f"for both ways of switching off together, not {group.graceful_ms}"
        )
    return [sentence for sentence in (*found, *_address_problems(group)) if sentence]


def _nodes_problem(group: CapacityGroup) -> str | None:
    try:
        nodes = group.names()
    except ValueError as error:
        return f"'nodes': {error}"
    strange = next((node for node in group.addresses if node not in nodes), None)
    if strange is not None:
        return f"'addresses' names {strange}, which is not among its nodes"
    return None if nodes else "'nodes' must name at least one node, such as n[01-40]"


def _address_problems(group: CapacityGroup) -> list[str]:
    """Of every node; the first that will not do is named, without what could be a secret in it."""
    if group.driver not in ("redfish", "ipmi", "wake"):
        return []
    if group.address and "{node}" not in group.address and len(_nodes(group)) > 1:
        return ["'address' must have {node} in it where there is more than one node"]
    for node in _nodes(group):
        address = group.address_of(node)
        sentence = _address_problem(group.driver, address)
        if sentence:
            return [f"the address of {node} {sentence}"]
    return []


def _address_problem(driver: str, address: str) -> str | None:
    if not address:
        return "is missing"
    if driver == "wake":
        return None if MAC.fullmatch(address) else "must be a MAC address, 00:11:22:33:44:55"
    if "@" in address:
        return "must not hold a user or password: they belong in credentials_file"
    if driver == "ipmi":
        bad = address.startswith("-") or not address.isprintable() or " " in address
        return "must be a host's name or address" if bad else None
    try:
        parts = urlsplit(address)
        host = parts.hostname
        parts.port  # noqa: B018 - it raises where it is no number
    except ValueError:
        return "must be https://HOST[:PORT]"
    if parts.scheme == "http" and host in LOOPBACK:
        return None
    if parts.scheme != "https" or not host:
        return "must be https://HOST[:PORT]; http:// would show its password to the network"
    return None


def _nodes(group: CapacityGroup) -> list[str]:
    try:
        return group.names()
    except ValueError:
        return []  # said already
