"""The coordinator's metrics: what each is called and means, and its value in a view of the shell.

Problem: dashboards and alerts outlive the code, so names, units and meanings must be decided once
and be right: base units in the name, `_total` for what only grows, a zero where zero is known and
no sample where nothing is. They stand here as data, `docs/metrics.md` is checked against them, and
a test checks the names. Nothing has a job, a node or a user for a label: how many series there are
does not depend on how much work there is.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client.metrics_core import Metric

from coordinator.core.census import Census
from coordinator.counts import Counts, View
from coordinator.exposition import Described
from coordinator.histogram import Histogram

JOBS = Described(
    "baton_jobs",
    "gauge",
    "Jobs, those that have ended as long as they are kept.",
    ("class", "phase"),
)
QUEUE = Described("baton_queue_length", "gauge", "Jobs that wait to be placed.", ("class",))
QUEUE_WAIT = Described(
    "baton_queue_wait_seconds", "gauge", "How long the job that was queued first has waited."
)
ATTEMPTS = Described(
    "baton_attempts",
    "gauge",
    "Attempts, those that have ended as long as they are kept.",
    ("phase",),
)
NODES = Described(
    "baton_nodes",
    "gauge",
    "Nodes that have ever said hello, but for those that are off on purpose.",
    ("phase", "intent"),
)
NODES_POWER = Described(
    "baton_nodes_power", "gauge", "Nodes that have ever said hello, by their power.", ("power",)
)
CAPACITY_ORDERS = Described(
    "baton_coordinator_capacity_orders_total",
    "counter",
    "Orders to switch nodes, given to a driver; one may be given again under its key.",
)
CAPACITY_FAILURES = Described(
    "baton_coordinator_capacity_failures_total",
    "counter",
    "Nodes for which a driver said that an order was not carried out.",
)
GPUS = Described("baton_gpus", "gauge", "GPUs of these nodes.", ("type", "phase"))
GPUS_ILL = Described(
    "baton_gpus_ill",
    "gauge",
    "GPUs that get no work: cordoned for their health, or unread. Those that are held_back should "
    "be cordoned, and are not for the fleet's limit.",
    ("reaction",),
)
CHECKPOINTS = Described("baton_checkpoints", "gauge", "Committed checkpoints that are kept.")
SESSIONS = Described("baton_sessions", "gauge", "Agents that are connected and welcomed.")
IN_LINE = Described(
    "baton_sessions_in_line", "gauge", "Agents that are connected and wait to be let in."
)
GPUS_SHARED = Described("baton_gpus_shared", "gauge", "GPUs of which somebody has a share.")
GPU_SHARES = Described("baton_gpu_shares", "gauge", "Shares of GPUs that attempts hold.")
GPU_SHARES_SIZE = Described(
    "baton_gpu_shares_bytes", "gauge", "GPU memory that all shares may take together."
)
LEADER_EPOCH = Described(
    "baton_coordinator_leader_epoch", "gauge", "The epoch under which this coordinator writes."
)
LOOP_LAG = Described(
    "baton_coordinator_loop_lag_seconds", "histogram", "How late the event loop came to a timer."
)
LOOP_ROUNDS = Described(
    "baton_coordinator_loop_rounds_total", "counter", "Rounds of the shell's loop."
)
BATCH = Described(
    "baton_coordinator_batch_events",
    "histogram",
    "Events that were handled and committed together.",
)
COMMIT = Described(
    "baton_coordinator_batch_commit_seconds",
    "histogram",
    "How long the store took to make a batch durable.",
)
COMMIT_FAILURES = Described(
    "baton_coordinator_batch_commit_failures_total",
    "counter",
    "Batches that the store could not take; they are tried again.",
)
STORE_UP = Described(
    "baton_coordinator_store_up", "gauge", "Whether the store took the last batch (1) or not (0)."
)
STORE_SIZE = Described(
    "baton_coordinator_store_size_bytes", "gauge", "The store's file and its write-ahead log."
)
INBOX = Described("baton_coordinator_inbox_length", "gauge", "Events that wait to be handled.")
HANDSHAKES = Described(
    "baton_coordinator_handshakes_total", "counter", "Streams that agents have opened."
)
WAITS_TOLD = Described(
    "baton_coordinator_waits_told_total",
    "counter",
    "How often agents were told to wait until they are let in.",
)
MESSAGES = Described("baton_coordinator_messages_total", "counter", "Messages of agents.")
MESSAGES_LOST = Described(
    "baton_coordinator_messages_lost_total",
    "counter",
    "Those that found no room; agents say them again.",
)
ORDERS = Described("baton_coordinator_orders_total", "counter", "Orders sent to agents.")
REQUESTS = Described("baton_coordinator_requests_total", "counter", "Requests of people and tools.")
REQUESTS_REFUSED = Described(
    "baton_coordinator_requests_refused_total",
    "counter",
    "Those that were not taken in, because the store or the queue of requests was full.",
)
REQUESTS_WAITING = Described(
    "baton_coordinator_requests_waiting", "gauge", "Requests that wait for their answer."
)
PROPOSALS = Described(
    "baton_coordinator_checkpoint_answers_total",
    "counter",
    "Answers to proposed checkpoints, accepted or refused; who asks again is answered again.",
    ("answer",),
)
SPANS = Described(
    "baton_coordinator_spans_exported_total", "counter", "Spans that `otel_endpoint` has taken."
)
SPANS_DROPPED = Described(
    "baton_coordinator_spans_dropped_total",
    "counter",
    "Those that it did not take in time; they are lost, which costs no training.",
)

METRICS: Final = (
    JOBS, QUEUE, QUEUE_WAIT, ATTEMPTS, NODES, GPUS, GPUS_ILL, CHECKPOINTS, SESSIONS, IN_LINE,
    GPUS_SHARED, GPU_SHARES, GPU_SHARES_SIZE, LEADER_EPOCH, LOOP_LAG, LOOP_ROUNDS, BATCH, COMMIT,
    COMMIT_FAILURES, STORE_UP, STORE_SIZE, INBOX, HANDSHAKES, WAITS_TOLD, MESSAGES,
    MESSAGES_LOST, ORDERS, REQUESTS, REQUESTS_REFUSED, REQUESTS_WAITING, PROPOSALS, SPANS,
    SPANS_DROPPED, NODES_POWER, CAPACITY_ORDERS, CAPACITY_FAILURES,
)  # fmt: skip


def figures(view: View, lag: Histogram, store_bytes: int | None) -> Iterator[Metric]:
    """Everything that is known now. `store_bytes` is what the store takes on its disk."""
    yield from _fleet_figures(view.census)
    yield from LOOP_LAG.spread(lag)
    yield from STORE_UP.one(view.store_up)
    yield from STORE_SIZE.one(store_bytes)
    yield from INBOX.one(view.inbox_length)
    yield from REQUESTS_WAITING.one(view.requests_waiting)
    yield from _counted_figures(view.counts)


def _fleet_figures(census: Census) -> Iterator[Metric]:
    yield from JOBS.of(((one.value, phase.value), n) for (one, phase), n in census.jobs)
    yield from QUEUE.of(((one.value,), n) for one, n in census.queued)
    yield from QUEUE_WAIT.one(census.waiting_s)
    yield from ATTEMPTS.of(((phase.value,), n) for phase, n in census.attempts)
    yield from NODES.of(((phase.value, intent.value), n) for (phase, intent), n in census.nodes)
    yield from NODES_POWER.of(((phase.value,), n) for phase, n in census.powers)
    yield from GPUS.of(((name, phase.value), n) for (name, phase), n in census.gpus)
    yield from GPUS_ILL.of(((reaction,), count) for reaction, count in census.ill)
    yield from CHECKPOINTS.one(census.checkpoints)
    yield from SESSIONS.one(census.sessions)
    yield from IN_LINE.one(census.in_line)
    yield from GPUS_SHARED.one(census.shares.gpus)
    yield from GPU_SHARES.one(census.shares.count)
    yield from GPU_SHARES_SIZE.one(census.shares.total_bytes)
    yield from LEADER_EPOCH.one(census.leader_epoch)


def _counted_figures(counts: Counts) -> Iterator[Metric]:
    yield from LOOP_ROUNDS.one(counts.rounds)
    yield from BATCH.spread(counts.batch_events)
    yield from COMMIT.spread(counts.commit_s)
    yield from COMMIT_FAILURES.one(counts.commit_failures)
    yield from HANDSHAKES.one(counts.sessions)
    yield from WAITS_TOLD.one(counts.waits_told)
    yield from MESSAGES.one(counts.messages)
    yield from MESSAGES_LOST.one(counts.messages_lost)
    yield from ORDERS.one(counts.orders)
    yield from REQUESTS.one(counts.requests)
    yield from REQUESTS_REFUSED.one(counts.requests_refused)
    answers = (("accepted", counts.checkpoints_accepted), ("refused", counts.checkpoints_refused))
    yield from PROPOSALS.of(((answer,), n) for answer, n in answers)
    yield from SPANS.one(counts.spans_exported)
    yield from SPANS_DROPPED.one(counts.spans_dropped)
    yield from CAPACITY_ORDERS.one(counts.capacity_orders)
    yield from CAPACITY_FAILURES.one(counts.capacity_failures)
