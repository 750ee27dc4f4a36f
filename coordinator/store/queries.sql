-- Every statement of every SQL store, one text for SQLite and PostgreSQL. `queries.py` reads this
-- file; the names are the fields of its class `Queries`. Each entry is a name, one sentence, and
-- one statement with `:name` parameters.

-- name: create_schema_migrations
-- Make the table that remembers which migrations were applied.
CREATE TABLE IF NOT EXISTS schema_migrations (
    name TEXT PRIMARY KEY,
    checksum TEXT NOT NULL,
    since TEXT NOT NULL
);

-- name: list_schema_migrations
-- Name, checksum and first version of every applied migration, oldest first.
SELECT name, checksum, since FROM schema_migrations ORDER BY name;

-- name: add_schema_migration
-- Remember that a migration was applied, in the transaction that applies it.
INSERT INTO schema_migrations (name, checksum, since) VALUES (:name, :checksum, :since);

-- name: advance_leader
-- Become leader; every commit under an older epoch now finds no row to lock.
UPDATE leader SET epoch = epoch + 1;

-- name: read_leader
-- The epoch of the present leader.
SELECT epoch FROM leader;

-- name: lock_leader
-- First statement of every commit: hold the leader's row until the transaction ends, or change no
-- row and stop.
UPDATE leader SET epoch = epoch WHERE epoch = :epoch;

-- name: raise_leader
-- A copy was put back: be above every leader there may have been since it was made.
UPDATE leader SET epoch = epoch + :epochs;

-- name: list_counters
-- Single numbers by name. `last_job_id`: the highest id that was ever given out, also when its job
-- has left the store. Of a store that was a copy: `copied_unix_ms`, when that was made, until it is
-- opened, then 0, and `copied_leader_epoch`, who led then: where there has been another one since,
-- an older version that does not know copies has worked with it, and it is none any more. The
-- others as in `core/restored.py`.
SELECT name, value FROM counters;

-- name: put_counter
-- Write a single number.
INSERT INTO counters (name, value) VALUES (:name, :value)
ON CONFLICT (name) DO UPDATE SET value = excluded.value;

-- name: mark_copy
-- Say in a copy when it was made; of a copy of a copy that nobody opened, the first one counts.
INSERT INTO counters (name, value) VALUES ('copied_unix_ms', :unix_ms)
ON CONFLICT (name) DO UPDATE SET value = excluded.value
WHERE counters.value = 0 OR EXISTS (
    SELECT 1 FROM counters AS other
    WHERE other.name = 'copied_leader_epoch' AND other.value < (SELECT epoch FROM leader)
);

-- name: mark_copy_leader
-- Say in a copy who led when it was made; after `mark_copy`, which looks at what was said before.
INSERT INTO counters (name, value) SELECT 'copied_leader_epoch', epoch FROM leader WHERE true
ON CONFLICT (name) DO UPDATE SET value = excluded.value;

-- name: raise_last_job_id
-- Remember a job id as given out; the counter never goes back.
UPDATE counters SET value = :job_id WHERE name = 'last_job_id' AND value < :job_id;

-- name: list_jobs
-- Every job, in the order of submission.
SELECT document FROM jobs ORDER BY id;

-- name: put_job
-- Write a job, whether it is new or not.
INSERT INTO jobs (id, request_id, phase, job_class, project, document)
VALUES (:id, :request_id, :phase, :job_class, :project, :document)
ON CONFLICT (id) DO UPDATE SET
    request_id = excluded.request_id,
    phase = excluded.phase,
    job_class = excluded.job_class,
    project = excluded.project,
    document = excluded.document;

-- name: drop_job
-- Forget a job's own row.
DELETE FROM jobs WHERE id = :job_id;

-- name: list_attempts
-- Every attempt, by job, oldest first.
SELECT document FROM attempts ORDER BY job_id, epoch;

-- name: put_attempt
-- Write an attempt, whether it is new or not.
INSERT INTO attempts (job_id, epoch, node, phase, document)
VALUES (:job_id, :epoch, :node, :phase, :document)
ON CONFLICT (job_id, epoch) DO UPDATE SET
    node = excluded.node,
    phase = excluded.phase,
    document = excluded.document;

-- name: trim_ranks
-- Of a job's tries keep the ranks of the newest, before `trim_attempts`, by whose rows they count.
DELETE FROM ranks WHERE job_id = :job_id AND epoch <= (
    SELECT kept.epoch FROM attempts AS kept
    WHERE kept.job_id = :job_id
    ORDER BY kept.epoch DESC
    LIMIT 1 OFFSET :attempts_max
);

-- name: trim_attempts
-- Keep a job's newest tries; with fewer than that the inner SELECT is NULL and nothing goes.
DELETE FROM attempts WHERE job_id = :job_id AND epoch <= (
    SELECT kept.epoch FROM attempts AS kept
    WHERE kept.job_id = :job_id
    ORDER BY kept.epoch DESC
    LIMIT 1 OFFSET :attempts_max
);

-- name: drop_attempts
-- Forget all attempts of a job.
DELETE FROM attempts WHERE job_id = :job_id;

-- name: list_ranks
-- Every rank of a gang but rank 0, which is among the attempts; by job, oldest first.
SELECT document FROM ranks ORDER BY job_id, epoch, attempt_rank;

-- name: put_rank
-- Write one rank of a gang, whether it is new or not.
INSERT INTO ranks (job_id, epoch, attempt_rank, node, phase, document)
VALUES (:job_id, :epoch, :attempt_rank, :node, :phase, :document)
ON CONFLICT (job_id, epoch, attempt_rank) DO UPDATE SET
    node = excluded.node,
    phase = excluded.phase,
    document = excluded.document;

-- name: drop_ranks
-- Forget all ranks of a job.
DELETE FROM ranks WHERE job_id = :job_id;

-- name: list_checkpoints
-- Every checkpoint, by job, earliest step first; the digest decides between equal steps.
SELECT document FROM checkpoints ORDER BY job_id, step, digest;

-- name: put_checkpoint
-- Write a checkpoint, whether it is new or not.
INSERT INTO checkpoints (job_id, digest, step, document)
VALUES (:job_id, :digest, :step, :document)
ON CONFLICT (job_id, digest) DO UPDATE SET
    step = excluded.step,
    document = excluded.document;

-- name: drop_checkpoint
-- Forget one checkpoint of a job.
DELETE FROM checkpoints WHERE job_id = :job_id AND digest = :digest;

-- name: drop_checkpoints
-- Forget all checkpoints of a job.
DELETE FROM checkpoints WHERE job_id = :job_id;

-- name: list_parts
-- Every part of a checkpoint that waits for others, by job, in order of arrival.
SELECT document FROM parts ORDER BY job_id, sequence, attempt_rank, digest;

-- name: put_part
-- Write a waiting part, whether it is new or not.
INSERT INTO parts (job_id, attempt_rank, digest, sequence, document)
VALUES (:job_id, :attempt_rank, :digest, :sequence, :document)
ON CONFLICT (job_id, attempt_rank, digest) DO UPDATE SET
    sequence = excluded.sequence,
    document = excluded.document;

-- name: drop_part
-- Forget one waiting part.
DELETE FROM parts
WHERE job_id = :job_id AND attempt_rank = :attempt_rank AND digest = :digest;

-- name: drop_parts
-- Forget all waiting parts of a job.
DELETE FROM parts WHERE job_id = :job_id;

-- name: list_nodes
-- Every node, by its id.
SELECT document FROM nodes ORDER BY id;

-- name: put_node
-- Write a node, whether it is new or not.
INSERT INTO nodes (id, document) VALUES (:id, :document)
ON CONFLICT (id) DO UPDATE SET document = excluded.document;

-- name: drop_node
-- Forget a node.
DELETE FROM nodes WHERE id = :id;

-- name: list_events
-- A page of a job's history, oldest first.
SELECT job_id, sequence, unix_ms, name, attempt, node, message FROM events
WHERE job_id = :job_id AND sequence > :after_sequence
ORDER BY sequence
LIMIT :events_max;

-- name: put_event
-- Write a line of a job's history; a repeated batch writes the same line again.
INSERT INTO events (job_id, sequence, unix_ms, name, attempt, node, message)
VALUES (:job_id, :sequence, :unix_ms, :name, :attempt, :node, :message)
ON CONFLICT (job_id, sequence) DO UPDATE SET
    unix_ms = excluded.unix_ms,
    name = excluded.name,
    attempt = excluded.attempt,
    node = excluded.node,
    message = excluded.message;

-- name: trim_events
-- Keep a job's newest lines; with fewer lines than that the inner SELECT is NULL and nothing goes.
DELETE FROM events WHERE job_id = :job_id AND sequence <= (
    SELECT kept.sequence FROM events AS kept
    WHERE kept.job_id = :job_id
    ORDER BY kept.sequence DESC
    LIMIT 1 OFFSET :events_max
);

-- name: drop_events
-- Forget the history of a job.
DELETE FROM events WHERE job_id = :job_id;

-- name: list_demand_series
-- Every series of demand that was ever wanted, by its number.
SELECT document FROM demand_series ORDER BY series_number;

-- name: put_demand_series
-- Give a series its number; a repeated batch gives it again.
INSERT INTO demand_series (series_number, gpu_type, project, job_class, document)
VALUES (:series_number, :gpu_type, :project, :job_class, :document)
ON CONFLICT (series_number) DO UPDATE SET
    gpu_type = excluded.gpu_type,
    project = excluded.project,
    job_class = excluded.job_class,
    document = excluded.document;

-- name: list_demand
-- Every step of demand, by period, oldest first.
SELECT document FROM demand ORDER BY period_min, step;

-- name: put_demand
-- Write what was wanted in one step, whether it is new or not.
INSERT INTO demand (period_min, step, document) VALUES (:period_min, :step, :document)
ON CONFLICT (period_min, step) DO UPDATE SET document = excluded.document;

-- name: trim_demand
-- Forget the steps of a period that are older than is kept of it.
DELETE FROM demand WHERE period_min = :period_min AND step <= :last_step;

-- name: drop_demand
-- Forget the steps that end after a minute; the first minute of a step is its number times its
-- period.
DELETE FROM demand WHERE (step + 1) * period_min > :after_minute + 1;

-- name: list_scale_records
-- Every decision of the fleet's size that is kept, oldest first.
SELECT document FROM scale_records ORDER BY record_number;

-- name: put_scale_record
-- Write a decision, whether it is new or not.
INSERT INTO scale_records (record_number, gpu_type, unix_ms, document)
VALUES (:record_number, :gpu_type, :unix_ms, :document)
ON CONFLICT (record_number) DO UPDATE SET document = excluded.document;

-- name: trim_scale_records
-- Forget the decisions up to this one.
DELETE FROM scale_records WHERE record_number <= :last_number;

-- name: list_lease_days
-- The days on which it was said what is worth leasing, in order.
SELECT day FROM lease_days ORDER BY day;

-- name: put_lease_day
-- Note such a day; a repeated batch notes it again.
INSERT INTO lease_days (day) VALUES (:day) ON CONFLICT (day) DO NOTHING;

-- name: trim_lease_days
-- Forget the days that are far from the newest one.
DELETE FROM lease_days WHERE day < :first_day OR day > :last_day;
