"""Torture: many faults at random instants, and then the books are checked.

    python -m tests.e2e.torture --coordinator-kills 1000 --agent-faults 1000 --seed 1

Problem: a store that loses one acknowledged record in five hundred crashes passes every test that
crashes it five times. So here the faults are many, and their instants come from a seed. (The
processes are real and keep their own time, so a seed repeats the plan and not the interleaving.)

*The coordinator* is killed (SIGKILL) again and again while sixteen clients submit. A client writes
down, in this process's memory, each request id and the job id that acknowledged it, and nothing
that was not acknowledged. In the end every acknowledged pair must be there, through gRPC and in the
SQLite file itself, no job id may stand for two requests, and no request for two jobs. A request
whose answer was lost is sent again under the same id, as the contract says.

*Agents* suffer one of three faults at a time: SIGKILL of the agent alone (its trainers go on and
must be adopted), death of the node (everything killed, disk gone; it returns empty), or silence for
longer than the lease (agent and trainers stopped, then continued: the returning zombie). Meanwhile
small real trainers (`trainers/ticking.py`) commit checkpoints and note all that they do in a file
of each job's own. Checked from those notes, from the coordinator's log and from its history:

- commits of a job never go back in step, and never from an epoch below one that has committed;
- no two copies both commit: after a successor's first commit the old copy hears of no commit;
- an old copy is stopped: after its agent is back in touch (its node up again) it leaves within the
  time that a stop takes, and at the end no process of an old attempt lives;
- every job finishes, at its last step.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from coordinator.config import STORE_NAME
from coordinator.store.sqlite import SqliteStore
from protos.baton.v1 import jobs_pb2, jobs_pb2_grpc, types_pb2
from tests.e2e.agent_faults import PAUSE, torture_agents
from tests.e2e.cluster import Cluster

KILLS_DEFAULT, FAULTS_DEFAULT = 1_000, 1_000
CLIENTS = 16
# Between a coordinator that serves and its death: from nothing to some hundred submissions.
LIFE_S_MAX = 0.25
CALL_S_MAX = 5.0
RETRY_S = 0.05
PAGE = 1_000
# Then the books are checked and begun anew: a start reads every job, and a thousand long starts are
# hours in which little is killed in the middle of anything.
JOBS_PER_STORE_MAX = 10_000


@dataclass(slots=True)
class Books:
    """What the clients were told. One list per client, so that no lock slows them."""

    acknowledged: list[list[tuple[str, int]]] = field(
        default_factory=lambda: [[] for _ in range(CLIENTS)]
    )
    failures: list[str] = field(default_factory=list)
    retried: list[int] = field(default_factory=lambda: [0] * CLIENTS)

    @property
    def count(self) -> int:
        return sum(len(pairs) for pairs in self.acknowledged)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.e2e.torture", description="Many faults.")
    parser.add_argument("--coordinator-kills", type=int, default=KILLS_DEFAULT)
    parser.add_argument("--agent-faults", type=int, default=FAULTS_DEFAULT)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(arguments)
    say(
        f"torture: python -m tests.e2e.torture --coordinator-kills {asked.coordinator_kills} "
        f"--agent-faults {asked.agent_faults} --seed {asked.seed}"
    )
    problems: list[str] = []
    if asked.coordinator_kills:
        problems += torture_coordinator(asked.coordinator_kills, asked.seed)
    if asked.agent_faults:
        problems += torture_agents(asked.agent_faults, asked.seed, say)
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say("torture: FAILED" if problems else "torture: all that must hold, held")
    return 1 if problems else 0


def torture_coordinator(kills: int, seed: int) -> list[str]:
    """Kill and restart it `kills` times under clients; returns what went wrong."""
    chance = random.Random(seed)
    problems: list[str] = []
    done = 0
    began_s = time.monotonic()
    totals = {"acknowledged": 0, "retried": 0, "stores": 0}
    while done < kills:
        with tempfile.TemporaryDirectory(prefix="baton-torture-") as scratch:
            books = Books()
            with Cluster(Path(scratch), patient=False) as cluster:
                done += one_store(cluster, books, chance, kills - done)
                problems += [*books.failures, *audit(cluster, books)]
        totals["acknowledged"] += books.count
        totals["retried"] += sum(books.retried)
        totals["stores"] += 1
    say(
        f"coordinator: {done} kills in {time.monotonic() - began_s:.0f} s on {totals['stores']} "
        f"store(s); {totals['acknowledged']} submissions acknowledged to {CLIENTS} clients, "
        f"{totals['retried']} calls cut and sent again; {len(problems)} problems"
    )
    return problems


def one_store(cluster: Cluster, books: Books, chance: random.Random, kills: int) -> int:
    """Up to `kills` deaths on one store; returns how many there were. It serves at the end."""
    cluster.start_coordinator(log_level="error")
    stop = threading.Event()
    clients = [
        threading.Thread(target=submit_on, args=(cluster.address, index, books, stop))
        for index in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    done = 0
    try:
        while done < kills and books.count < JOBS_PER_STORE_MAX:
            PAUSE.wait(chance.uniform(0.0, LIFE_S_MAX))
            cluster.kill_coordinator()
            cluster.start_coordinator(log_level="error")
            done += 1
            if done % 50 == 0:
                say(f"coordinator: {done} kills, {books.count} acknowledged on this store")
    finally:
        stop.set()
        for client in clients:
            client.join()
    return done


def submit_on(address: str, index: int, books: Books, stop: threading.Event) -> None:
    """One client: submit, and submit again under the same id when the answer did not come."""
    options = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 20),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # what an attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", 50),
    )
    spec = types_pb2.JobSpec(command=["true"], hold=True)
    pairs = books.acknowledged[index]
    with grpc.insecure_channel(address, options) as channel:
        stub = jobs_pb2_grpc.JobServiceStub(channel)
        number = 0
        while not stop.is_set():
            request_id = f"client-{index}-{number}"
            request = jobs_pb2.SubmitRequest(request_id=request_id, spec=spec)
            try:
                pairs.append((request_id, stub.Submit(request, timeout=CALL_S_MAX).job_id))
            except grpc.RpcError as error:
                code = error.code()
                if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    books.failures.append(f"{request_id} was answered {code}")
                    return
                books.retried[index] += 1
                PAUSE.wait(RETRY_S)
            else:
                number += 1


def audit(cluster: Cluster, books: Books) -> list[str]:
    """Every acknowledged pair is there, once; returns what is not as it must be."""
    listed: set[int] = set()
    before = 0
    while True:
        request = jobs_pb2.ListJobsRequest(page_size=PAGE, before_job_id=before)
        page = cluster.jobs.ListJobs(request)
        listed.update(job.id for job in page.jobs)
        before = page.next_before_job_id
        if not before:
            break
    cluster.stop_coordinator()
    stored = asyncio.run(read_store(cluster.directory / "coordinator" / STORE_NAME))
    return compare(books, listed, stored)


async def read_store(path: Path) -> list[tuple[int, str]]:
    """Job and request ids as the file holds them."""
    store = SqliteStore(path)
    snapshot = await store.open()
    await store.close()
    return [(job.id, job.request_id) for job in snapshot.jobs]


def compare(books: Books, listed: set[int], stored: list[tuple[int, str]]) -> list[str]:
    """What the clients were told against what the coordinator lists and what its file holds."""
    problems = []
    job_of = {request_id: job_id for job_id, request_id in stored}
    if len(job_of) != len(stored):
        problems.append(f"{len(stored) - len(job_of)} requests stand for more than one job")
    if {job_id for job_id, _ in stored} != listed:
        problems.append(f"{len(listed)} jobs are listed and {len(stored)} stored")
    owner: dict[int, str] = {}
    for request_id, job_id in (pair for pairs in books.acknowledged for pair in pairs):
        if job_of.get(request_id) != job_id:
            problems.append(
                f"{request_id} was acknowledged as job {job_id} and is {job_of.get(request_id)}"
            )
        if owner.setdefault(job_id, request_id) != request_id:
            problems.append(f"job id {job_id} was given to {owner[job_id]} and {request_id}")
    return problems


def say(line: str) -> None:
    """To the person who waits."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
