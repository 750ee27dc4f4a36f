"""Ray's jobs, one after the other and some at once, by its own client; run by Ray's interpreter.

Arguments: a directory for stamps, and how much to measure, as JSON; prints what it found as JSON.
"""

import json
import sys
import time
from pathlib import Path

import ray  # type: ignore[import-not-found]
from ray.job_submission import JobSubmissionClient  # type: ignore[import-not-found]

DASHBOARD = "http://127.0.0.1:8265"
WAIT_S_MAX = 300.0
POLL_S = 0.002
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def main() -> None:
    directory, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
    client = connected()
    first_s = [one(client, directory / f"stamp-{n}") for n in range(int(asked["ray_jobs"]) + 1)]
    count = int(asked["ray_burst"])
    began_s = time.monotonic()
    names = [client.submit_job(entrypoint="true") for _ in range(count)]
    for name in names:
        wait_end(client, name)
    found = {
        "version": f"ray {ray.__version__}",
        "first_s": first_s[1:],  # the first one is its agents' start
        "burst_jobs": count,
        "burst_per_s": count / (time.monotonic() - began_s),
    }
    print(json.dumps(found))


def connected() -> JobSubmissionClient:
    """Once it serves."""
    end_s = time.monotonic() + WAIT_S_MAX
    while True:
        try:
            client = JobSubmissionClient(DASHBOARD)
            client.list_jobs()
        except (ConnectionError, RuntimeError):
            if time.monotonic() > end_s:
                raise
            time.sleep(1)
        else:
            return client


def one(client: JobSubmissionClient, stamp: Path) -> float:
    """Seconds from the request to the job's first instruction."""
    script = f"date +%s.%N > {stamp}.part; mv {stamp}.part {stamp}"
    began_s = time.time()
    name = client.submit_job(entrypoint=script)
    end_s = time.monotonic() + WAIT_S_MAX
    while not stamp.exists():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{name}: {client.get_job_status(name)}")
        time.sleep(POLL_S)
    wait_end(client, name)
    return float(stamp.read_text("ascii")) - began_s


def wait_end(client: JobSubmissionClient, name: str) -> None:
    end_s = time.monotonic() + WAIT_S_MAX
    while client.get_job_status(name).value not in ENDED:
        if time.monotonic() > end_s:
            raise TimeoutError(name)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
