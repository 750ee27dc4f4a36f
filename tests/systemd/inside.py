"""What a process finds itself allowed where it runs: a job of the emulated machine's tests.

Standard library only: it is run by Debian's interpreter.

    python3 inside.py /dev/nvidia0 /dev/nvidia1

One line of JSON: its user, its GPUs, what the kernel holds its control group to, and for each
device `opened` or the name of the error.
"""

import errno
import json
import os
import pwd
import sys
from pathlib import Path

LIMITS = ("memory.max", "memory.swap.max", "pids.max")


def opening(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "opened"


def main(devices: list[str]) -> None:
    (line,) = Path("/proc/self/cgroup").read_text().splitlines()
    group = Path("/sys/fs/cgroup") / line.rpartition(":")[2].lstrip("/")
    found = {
        "user": pwd.getpwuid(os.getuid()).pw_name,
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "limits": {
            name: (group / name).read_text().strip() for name in LIMITS if (group / name).exists()
        },
        "devices": {path: opening(path) for path in devices},
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
