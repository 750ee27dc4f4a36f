"""Whether the state directory belongs to the machine on which it is found.

Problem: a disk is cloned, or an image is made of a node with its state in it, and two machines
claim one journal: they take the session from each other, and answer for the same jobs. Nothing in
the copy is wrong, so only the machine can tell. `/etc/machine-id` cannot: it is copied along, which
is why images are to be shipped without it, and a system installed anew on the same hardware has
another. DMI's product UUID only root may read, and cheap boards share a placeholder.

How: the state directory keeps what hardware it has seen: the GPUs' UUIDs and the addresses of
network interfaces. One of either that is still there is enough, so a new mainboard, or all new
GPUs, go unnoticed. Where nothing is left the agent does not start, until a person says which it is.
Where no interface can be seen (a container) nothing is said.

Sources: machine-id(5), "First Boot Semantics"; HashiCorp Consul, which keeps a node's id in its
data directory and refuses a name that another id holds.
"""

import json
import os
import socket
from pathlib import Path
from typing import Final

FILE_NAME: Final = "host.json"
KINDS: Final = ("gpus", "interfaces")

_GPU_UUID: Final = "GPU UUID:"
_INFINIBAND_BYTES: Final = 20  # of its address the last eight are the port's, others a session's
_PERMANENT: Final = "0"
_NO_ADDRESS: Final = "00:00:00:00:00:00"


class HostChanged(Exception):
    """The text is a sentence that says what to do."""


def check(directory: Path, root: Path = Path("/")) -> None:
    """Note the machine's hardware in `directory`. Raises `HostChanged` where what was noted there
    before is of another machine, and OSError. `root`: where /proc and /sys are."""
    path = directory / FILE_NAME
    before = _noted(path)
    here = {"gpus": _gpus(root), "interfaces": _interfaces(root)}
    known = [kind for kind in KINDS if here[kind] and before.get(kind)]
    # A container sees no interface that is hardware, and may be given other GPUs each time.
    if "interfaces" in known and not any(set(here[kind]) & set(before[kind]) for kind in known):
        raise HostChanged(
            f"{directory} is the state of another machine ({', '.join(before['hostname'])}): none "
            f"of the {' or '.join(known)} noted in {path} is here. If it came with a copied disk or"
            " image, remove the directory, or name another state_directory; if it is this"
            f" machine's own, with new hardware: rm {path}"
        )
    noted = {**before, **{kind: here[kind] for kind in KINDS if here[kind]}}
    if noted != before:
        _note(path, {**noted, "hostname": [socket.gethostname()]})


def _noted(path: Path) -> dict[str, list[str]]:
    """Lists by kind; empty for a file that is not there, or that is not ours."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    lists = found if isinstance(found, dict) else {}
    return {key: [str(one) for one in lists.get(key) or ()] for key in (*KINDS, "hostname")}


def _note(path: Path, noted: dict[str, list[str]]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(noted, indent=2) + "\n", "utf-8")
        partial.replace(path)
    except OSError as error:  # that a disk is full comes without a name
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def _gpus(root: Path) -> list[str]:
    """As the driver lists them; it writes question marks before it has asked a GPU."""
    files = (root / "proc/driver/nvidia/gpus").glob("*/information")
    lines = [line for file in files for line in _text(file).splitlines()]
    uuids = [line.partition(":")[2].strip() for line in lines if line.startswith(_GPU_UUID)]
    return sorted(uuid for uuid in uuids if "?" not in uuid)


def _interfaces(root: Path) -> list[str]:
    """Addresses of those that are hardware. Not on USB, where many a management controller has the
    same one in every machine, and not functions that are made at each boot. Nor what is no address
    of the hardware: a random one is another at each boot, and one that was set is in a copied
    configuration too (`addr_assign_type`: sysfs-class-net)."""
    found = set()
    for interface in (root / "sys/class/net").glob("*"):
        device = interface / "device"
        on_usb = os.path.basename(os.path.realpath(device / "subsystem")) == "usb"
        if not device.exists() or on_usb or (device / "physfn").exists():
            continue
        own = _text(interface / "bonding_slave/perm_hwaddr")
        if not own and _text(interface / "addr_assign_type").strip() in ("", _PERMANENT):
            own = _text(interface / "address")
        octets = own.strip().split(":")
        address = ":".join(octets[-8:] if len(octets) == _INFINIBAND_BYTES else octets)
        if address not in ("", _NO_ADDRESS):
            found.add(address)
    return sorted(found)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""  # not there, or not for us
