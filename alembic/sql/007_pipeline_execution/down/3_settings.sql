-- == pipelines: drop execution settings
ALTER TABLE circle.pipelines
    DROP COLUMN IF EXISTS timeout_seconds,
    DROP COLUMN IF EXISTS max_retries_per_node,
    DROP COLUMN IF EXISTS retry_backoff_base,
    DROP COLUMN IF EXISTS retry_backoff_max;
