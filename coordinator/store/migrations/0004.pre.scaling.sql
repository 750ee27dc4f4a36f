-- Since 0.1.0: what was decided of the fleet's size.
--
-- The newest are kept; `record_number` grows by one with each.

CREATE TABLE scale_records (
    record_number BIGINT PRIMARY KEY,
    gpu_type TEXT NOT NULL,
    unix_ms BIGINT NOT NULL,
    document TEXT NOT NULL
);
