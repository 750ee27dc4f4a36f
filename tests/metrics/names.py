"""The rules for a metric's name and text, as findings.

Problem: `promtool` is not on every machine, and does not know our own words. These are the rules of
Prometheus (prometheus.io/docs/practices/naming) as far as they can be read off a name, and ours:
the prefix, a unit out of a short list, a text that is a sentence.
"""

import re
from collections.abc import Iterable, Iterator

from agent.exposition import Described as AgentDescribed
from coordinator.exposition import Described as CoordinatorDescribed

Described = AgentDescribed | CoordinatorDescribed

# Base units, and what each means in a table for people.
UNITS = {
    "seconds": "seconds",
    "bytes": "bytes",
    "ratio": "0 to 1",
    "celsius": "°C",
    "watts": "W",
    "joules": "J",
    "hertz": "Hz",
}
# Units that somebody might write instead.
FOREIGN_WORDS = frozenset(
    """ms milliseconds millis minutes hours s percent pct kb mb gb kib mib gib kilobytes megabytes
    mebibytes mw milliwatts kw mj millijoules mhz megahertz ghz degrees fahrenheit""".split()
)
_NAME = re.compile(r"baton(_[a-z0-9]+)+")
_LABEL = re.compile(r"[a-z][a-z0-9_]*")
# Ours already, or the library's.
_LABELS_TAKEN = frozenset(("le", "quantile", "job", "instance"))


def unit(name: str) -> str:
    """The unit in a name; empty for a plain number."""
    last = name.removesuffix("_total").rpartition("_")[2]
    return last if last in UNITS else ""


def findings(metrics: Iterable[Described]) -> Iterator[str]:
    """What is wrong, as sentences."""
    seen: dict[str, None] = {}
    for metric in metrics:
        name = metric.name
        words = name.split("_")
        if name in seen:
            yield f"{name} is there twice"
        seen[name] = None
        if not _NAME.fullmatch(name):
            yield f"{name} is not baton_ and lower-case words"
        if (metric.kind == "counter") != name.endswith("_total"):
            yield f"{name}: counters, and they alone, end in _total"
        if any(word in FOREIGN_WORDS for word in words):
            yield f"{name} is not in a base unit"
        inner = words[:-2] if words[-1] == "total" else words[:-1]
        if any(word in UNITS for word in inner):
            yield f"{name}: the unit comes last"
        if words[-1] in ("count", "sum", "bucket", "info"):
            yield f"{name} ends as parts of a histogram do"
        if not re.fullmatch(r"[A-Z].*\.", metric.help) or "\n" in metric.help:
            yield f"{name} has no sentence that says what it is"
        for label in metric.labels:
            if not _LABEL.fullmatch(label) or label in _LABELS_TAKEN:
                yield f"{name}: {label!r} will not do as a label"
