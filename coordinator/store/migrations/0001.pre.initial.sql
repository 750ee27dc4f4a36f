-- Since 0.1.0: jobs, attempts, checkpoints, nodes and history; the leader's row and the counters.
--
-- BIGINT and TEXT mean the same in SQLite and PostgreSQL. What people look for with a database
-- shell is a column; the whole value is in `document`, so a new field with a default needs no
-- migration.

CREATE TABLE leader (
    one SMALLINT PRIMARY KEY CHECK (one = 1),
    epoch BIGINT NOT NULL
);

INSERT INTO leader (one, epoch) VALUES (1, 0);

CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);

INSERT INTO counters (name, value) VALUES ('last_job_id', 0);

CREATE TABLE jobs (
    id BIGINT PRIMARY KEY,
    request_id TEXT NOT NULL,
    phase TEXT NOT NULL,
    job_class TEXT NOT NULL,
    project TEXT NOT NULL,
    document TEXT NOT NULL
);

CREATE TABLE attempts (
    job_id BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    node TEXT NOT NULL,
    phase TEXT NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (job_id, epoch)
);

CREATE TABLE checkpoints (
    job_id BIGINT NOT NULL,
    digest TEXT NOT NULL,
    step BIGINT NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (job_id, digest)
);

CREATE TABLE nodes (
    id TEXT PRIMARY KEY,
    document TEXT NOT NULL
);

CREATE TABLE events (
    job_id BIGINT NOT NULL,
    sequence BIGINT NOT NULL,
    unix_ms BIGINT NOT NULL,
    name TEXT NOT NULL,
    attempt TEXT NOT NULL,
    node TEXT NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (job_id, sequence)
);
