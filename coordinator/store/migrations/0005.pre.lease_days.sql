-- Since 0.1.0: on which days it was said what is worth leasing.
--
-- `day` counts those since 1970, by UTC; a month of them is kept.

CREATE TABLE lease_days (
    day BIGINT PRIMARY KEY
);
