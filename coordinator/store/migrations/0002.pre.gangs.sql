-- Since 0.1.0: the ranks of gangs beyond rank 0, and parts of checkpoints that wait for the others.
--
-- `attempts` has one row a try, and the version before reads it so: rank 0 stays there. RANK is a
-- word of SQL.

CREATE TABLE ranks (
    job_id BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    attempt_rank BIGINT NOT NULL,
    node TEXT NOT NULL,
    phase TEXT NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (job_id, epoch, attempt_rank)
);

CREATE TABLE parts (
    job_id BIGINT NOT NULL,
    attempt_rank BIGINT NOT NULL,
    digest TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (job_id, attempt_rank, digest)
);
