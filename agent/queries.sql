-- The journal of a node: what it runs and what it still has to tell. SQLite.

-- name: create_meta
-- One row a key: journal_id, next_sequence, leader_epoch, xids_over, gpus_left.
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);

-- name: create_attempts
-- One row an attempt that this node answers for.
CREATE TABLE IF NOT EXISTS attempts (id TEXT PRIMARY KEY, document TEXT NOT NULL);

-- name: create_spool
-- Events that the coordinator has not acknowledged.
CREATE TABLE IF NOT EXISTS spool (sequence INTEGER PRIMARY KEY, document TEXT NOT NULL);

-- name: create_fences
-- The highest epoch of a job that must not start here any more. Not INTEGER PRIMARY KEY: that would
-- be the rowid itself, and the order in which fences were raised would be lost.
CREATE TABLE IF NOT EXISTS fences (job_id INTEGER NOT NULL UNIQUE, epoch INTEGER NOT NULL);

-- name: create_fenced_ranks
-- Of a gang: the ranks of the fence's epoch that must not start any more, in the order in which
-- they were added. A fence without any holds its whole epoch.
CREATE TABLE IF NOT EXISTS fenced_ranks (
    job_id INTEGER NOT NULL, rank INTEGER NOT NULL, UNIQUE (job_id, rank)
);

-- name: put_meta
-- Set one key.
INSERT INTO meta (key, value) VALUES (:key, :value)
ON CONFLICT (key) DO UPDATE SET value = excluded.value;

-- name: read_meta
-- All keys.
SELECT key, value FROM meta;

-- name: put_attempt
-- Insert or replace an attempt.
INSERT INTO attempts (id, document) VALUES (:id, :document)
ON CONFLICT (id) DO UPDATE SET document = excluded.document;

-- name: drop_attempt
-- The attempt is settled everywhere.
DELETE FROM attempts WHERE id = :id;

-- name: read_attempts
-- All attempts, in the order in which they arrived.
SELECT document FROM attempts ORDER BY rowid;

-- name: put_spooled
-- Keep an event until it is acknowledged.
INSERT INTO spool (sequence, document) VALUES (:sequence, :document)
ON CONFLICT (sequence) DO UPDATE SET document = excluded.document;

-- name: drop_spooled
-- Events up to this sequence are acknowledged.
DELETE FROM spool WHERE sequence <= :sequence;

-- name: read_spool
-- All events, oldest first.
SELECT document FROM spool ORDER BY sequence;

-- name: put_fence
-- Insert or raise a fence. A new row either way, so that it stands last.
INSERT OR REPLACE INTO fences (job_id, epoch) VALUES (:job_id, :epoch);

-- name: drop_fence
-- Forget the oldest.
DELETE FROM fences WHERE job_id = :job_id;

-- name: put_fenced_rank
-- One more rank of the job's fence.
INSERT INTO fenced_ranks (job_id, rank) VALUES (:job_id, :rank);

-- name: drop_fenced_ranks
-- Those of the fence that is dropped or replaced.
DELETE FROM fenced_ranks WHERE job_id = :job_id;

-- name: read_fences
-- All fences, the one raised last at the end; one row for each rank that is named.
SELECT fences.job_id, fences.epoch, fenced_ranks.rank
FROM fences LEFT JOIN fenced_ranks ON fenced_ranks.job_id = fences.job_id
ORDER BY fences.rowid, fenced_ranks.rowid;
