"""Series of GPU demand of Alibaba's clusters, for `bench.forecast`, from tables that are public.

    python -m bench.alibaba_series --spot hourly_concurrency_top_models.csv \\
        --pods openb_pod_list_default.csv --dlrm disaggregated_DLRM_trace.csv --out FOLDER

- *spot* (cluster-trace-v2026-spot-gpu): GPUs that are asked for by jobs that touch the hour, for
  each of six models, counted by sultanul-ovi/GPU-Cluster-Spot-Resource-Dataset-Analysis (GitHub,
  3a727e5, MIT; outputs_extra/tables). Its first day (a ramp) and last three hours are cut.
- *pods* (github.com/alibaba/clusterdata, cluster-trace-gpu-v2023): what is asked for between
  creation and deletion, parts of a GPU as such, over the last 823 hours; before, the sample is
  nearly empty.
- *dlrm* (the same, cluster-trace-gpu-v2025): what instances of inference with GPUs (role HN) hold;
  an empty time lies before the beginning or after the end.

Those traces are limited to research and study: none of them is part of Baton. Any may be left out.
"""

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import report
from bench.forecast import ALIBABA_FILES

HOUR_S = 3600
SPOT_HOURS_CUT = (24, 3)  # at the beginning, at the end
PODS_HOURS = 823
DLRM_HOURS = 743
MILLI = 1000
Rows = Iterator[dict[str, str]]


def _rows(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def spot(path: Path) -> dict[str, list[float]]:
    """By model, and their sum. Negative ones are noise of a sum of floats."""
    read = list(_rows(path))[SPOT_HOURS_CUT[0] : -SPOT_HOURS_CUT[1]]
    models = [name for name in read[0] if name != "hour"]
    made = {name: [max(0.0, float(row[name])) for row in read] for name in models}
    return {**made, "total": [sum(hour) for hour in zip(*made.values(), strict=True)]}


def pods(path: Path) -> dict[str, list[float]]:
    """Best effort, the rest, and both."""
    held: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for row in _rows(path):
        gpus = int(row["num_gpu"]) * int(row["gpu_milli"]) / MILLI
        span = float(row["creation_time"]), _time(row["deletion_time"], math.inf)
        held[row["qos"] == "BE"].append((*span, gpus))
    last = max(end for spans in held.values() for _, end, _ in spans if end < math.inf)
    begin_s = (int(last // HOUR_S) - PODS_HOURS) * HOUR_S
    best_effort, latency = (_hourly(held[which], begin_s, PODS_HOURS) for which in (True, False))
    both = [sum(hour) for hour in zip(best_effort, latency, strict=True)]
    return {"demand": both, "best_effort": best_effort, "latency": latency}


def dlrm(path: Path) -> dict[str, list[float]]:
    """Of all services together."""
    held = [
        (_time(row["creation_time"], 0.0), _time(row["deletion_time"], math.inf), gpus)
        for row in _rows(path)
        if (gpus := float(row["gpu_request"])) and row["role"] == "HN"
    ]
    return {"demand": _hourly(held, 0, DLRM_HOURS)}


def _time(cell: str, otherwise: float) -> float:
    return float(cell) if cell else otherwise


def _hourly(held: list[tuple[float, float, float]], begin_s: float, hours: int) -> list[float]:
    """The mean of each hour of GPUs that are held, from spans of (begin, end, GPUs)."""
    gpu_s = [0.0] * hours
    for begin, end, gpus in held:
        at, until = max(0.0, begin - begin_s), min(end - begin_s, hours * HOUR_S)
        while at < until:
            hour = int(at // HOUR_S)
            upto = min(until, (hour + 1) * HOUR_S)
            gpu_s[hour] += gpus * (upto - at)
            at = upto
    return [each / HOUR_S for each in gpu_s]


MAKERS: dict[str, tuple[str, Callable[[Path], dict[str, list[float]]]]] = {
    "spot": ("spot", spot),
    "pods": ("openb", pods),
    "dlrm": ("dlrm", dlrm),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for flag in MAKERS:
        parser.add_argument(f"--{flag}", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for flag, (name, maker) in MAKERS.items():
        source = getattr(given, flag)
        if source is None:
            continue
        made = maker(source)
        target = given.out / ALIBABA_FILES[name]
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["hour", *made])
            writer.writerows(
                [hour, *(round(gpus, 2) for gpus in row)]
                for hour, row in enumerate(zip(*made.values(), strict=True))
            )
        report.say(f"alibaba_series: {target}")


if __name__ == "__main__":
    main()
