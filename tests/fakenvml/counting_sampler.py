"""The agent's sampler, which also writes down the binding's functions that it calls, one a line.

python counting_sampler.py CALLS_FILE DESCRIPTOR PARENT_PID
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import pynvml

from agent.telemetry import sampler


def count_calls(path: str) -> None:
    """The binding looks the pointer up once per call, found or not."""
    lookup: Callable[[str], Any] = pynvml._nvmlGetFunctionPointer
    calls = os.open(path, os.O_WRONLY | os.O_APPEND)

    def counted(name: str) -> Any:
        os.write(calls, f"{name}\n".encode())
        return lookup(name)

    pynvml._nvmlGetFunctionPointer = counted


if __name__ == "__main__":
    count_calls(sys.argv[1])
    sampler.main(int(sys.argv[2]))
