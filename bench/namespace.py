"""Programs of others in a network of their own: loopback, and nobody else can reach them.

Problem: Slurm and Ray listen on every interface by default, without a password or nearly so, and
leave processes behind when what started them is killed. A benchmark must do neither to the machine
that it runs on.

How: Linux namespaces, by `unshare` (util-linux). What is called runs in a new network, of which
only the loopback device is up, as the first process of a new tree of processes: when that ends, or
`unshare` does, the kernel ends all that are left of the tree.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# An address that is nobody's (RFC 5737). Without one that is not 127.0.0.1 the C library's resolver
# believes that there is no IPv4 and refuses even numbers (getaddrinfo(3), AI_ADDRCONFIG).
NOBODYS = "192.0.2.1/32"


class NamespaceError(Exception):
    """There is none to be had, or what ran inside has failed; the text says how."""


def call(module: str, arguments: Sequence[str], timeout_s: float) -> Any:
    """`module.inside(arguments)` in a namespace of its own; what it returns is JSON."""
    program = shutil.which("unshare")
    if program is None or shutil.which("ip") is None:
        raise NamespaceError("needs `unshare` and `ip` (apt-get install util-linux iproute2)")
    flags = ["--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        flags.append("--map-root-user")
    script = "import sys; from bench import namespace; namespace.enter(sys.argv[1], sys.argv[2:])"
    command = [program, *flags, sys.executable, "-c", script, module, *arguments]
    try:
        done = subprocess.run(
            command, check=False, timeout=timeout_s, stdout=subprocess.PIPE, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise NamespaceError(f"did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        raise NamespaceError(f"`{' '.join(command[:6])} ...` ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def enter(module: str, arguments: Sequence[str]) -> None:
    """The first act within; only `call` starts it."""
    for words in ("link set lo up", f"address add {NOBODYS} dev lo"):
        subprocess.run(["ip", *words.split()], check=True)
    inside = getattr(__import__(f"bench.{module}", fromlist=["inside"]), "inside")  # noqa: B009
    print(json.dumps(inside(arguments)), flush=True)
