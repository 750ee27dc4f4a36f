"""User and password of a node's controller, from a file that only this service can read.

Problem: a password on a command line is seen by everybody on the machine, and one in a
configuration by everybody who is shown it. So it stands in a TOML file of its own: `user` and
`password`, and `[nodes.NAME]` for those that have others. The file is read anew at each use, so a
new password needs no restart; and what is wrong with it is said without a word of it.
"""

import os
import stat
import tomllib
from dataclasses import dataclass
from typing import Any, Final

from coordinator.capacity.driver import CapacityError

FILE_BYTES_MAX: Final = 1 << 20  # ten thousand nodes with a password each


@dataclass(frozen=True, slots=True, repr=False)
class Login:
    user: str
    password: str


def read(path: str, node: str) -> Login:
    """Of the controller of `node`. Raises `CapacityError`."""
    values = _values(path)
    nodes = values.get("nodes", {})
    own = nodes.get(node, {}) if isinstance(nodes, dict) else {}
    found = {**values, **own} if isinstance(own, dict) else values
    user, password = found.get("user"), found.get("password")
    if not (isinstance(user, str) and isinstance(password, str) and user):
        raise CapacityError(f"{path} has no user and password for {node}")
    return Login(user, password)


def _values(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            # The group may: systemd gives credentials to a service by an access control list,
            # which shows there.
            if mode & 0o027:
                raise CapacityError(
                    f"{path} can be read or written by others (mode {mode:04o}): chmod 0600 it"
                )
            text = file.read(FILE_BYTES_MAX).decode()
        return tomllib.loads(text)
    except OSError as error:
        raise CapacityError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:  # not TOML, or not UTF-8; the parser's own words could show what it read
        raise CapacityError(f"{path} is not TOML") from None
