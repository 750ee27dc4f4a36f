"""What a training says on standard output: each line a JSON object with an ``event``.

Problem: the log of a job is read by people and by programs, and a figure may be nan or infinity,
for which JSON has no word: those are quoted.
"""

import json
import math
import sys
from typing import Any


def emit(event: str, **values: Any) -> None:
    """One line for people and programs."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = str(value)
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()
