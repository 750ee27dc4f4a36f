"""A machine room as files: programs such as a site has, which note how they were called.

`calls` has a line of JSON for each call, `on` a file for each node that is on, and `wrong` what the
programs do wrong: hang (with a child that outlives a kill of its parent), lie, or fail. One text
serves as every program; it knows by its name which one it is.
"""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
TEXT: Final = """#!{python} -S
import json, os, pathlib, sys
sys.path.insert(0, {root!r})
from coordinator.capacity import hostlist

here = pathlib.Path(__file__).parent
name = os.path.basename(__file__)
resume_file = os.environ.get("SLURM_RESUME_FILE")
call = {{
    "program": name,
    "arguments": sys.argv[1:],
    "environment": {{key: value for key, value in os.environ.items() if key != "LC_CTYPE"}},
    "resume": json.loads(pathlib.Path(resume_file).read_text()) if resume_file else None,
    "input": sys.stdin.read(),
    "pid": os.getpid(),
}}
if name == "ipmitool":
    host, word = sys.argv[sys.argv.index("-H") + 1], sys.argv[-1]
    on = here / "on" / host
    if word == "status":
        print("Chassis Power is", "on" if on.exists() else "off")
        sys.exit()
    call["command"] = sys.argv[1:]
    sys.argv[1:] = [host]
    name = "resume" if word == "on" else word
if name == "states":
    for node in hostlist.read(sys.argv[1]):
        print(node, "on" if (here / "on" / node).exists() else "off")
    sys.exit()
wrong = (here / "wrong").read_text()
if wrong == "hang":
    child = os.fork()
    if child == 0:
        while True:
            os.read(os.open(here / "never", os.O_RDWR), 1)
    call["child"] = child
with open(here / "calls", "a") as file:
    file.write(json.dumps(call) + "\\n")
if wrong == "hang":
    (here / "hangs").write_text(json.dumps(call))
    os.waitpid(child, 0)
if wrong == "fail":
    print("the power strip\\nis on fire")
    sys.exit(3)
deaf = name == "soft" and wrong == "deaf"
for node in hostlist.read(sys.argv[1]) if wrong != "lie" and not deaf else []:
    path = here / "on" / node
    if name in ("resume", "create"):
        path.touch()
    else:
        path.unlink(missing_ok=True)
"""


class Site:
    """In `folder`, which is empty."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "on").mkdir()
        (folder / "wrong").write_text("")
        os.mkfifo(folder / "never")
        os.mkfifo(folder / "hangs")

    def program(self, name: str) -> str:
        """Its path."""
        path = self._folder / name
        path.write_text(TEXT.format(python=sys.executable, root=str(ROOT)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def go_wrong(self, wrong: str) -> None:
        (self._folder / "wrong").write_text(wrong)

    def hanging(self) -> dict[str, Any]:
        """The call that hangs, as soon as there is one."""
        found: dict[str, Any] = json.loads((self._folder / "hangs").read_text())
        return found

    def is_on(self, node: str) -> bool:
        return (self._folder / "on" / node).exists()

    def calls(self) -> list[dict[str, Any]]:
        """But for those that ask for states."""
        path = self._folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]
