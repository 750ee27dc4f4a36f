-- Since 0.1.0: how many GPUs were wanted, by the minute, by ten minutes and by the hour.
--
-- One row a step for all series, so that a minute costs one row; what was not wanted is not in it.
-- A step that has no row is unknown.

CREATE TABLE demand_series (
    series_number BIGINT PRIMARY KEY,
    gpu_type TEXT NOT NULL,
    project TEXT NOT NULL,
    job_class TEXT NOT NULL,
    document TEXT NOT NULL
);

CREATE TABLE demand (
    period_min BIGINT NOT NULL,
    step BIGINT NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (period_min, step)
);
