-- Revision 007: execution settings, the status timeout, and node runs.

-- == pipelines: add execution settings
ALTER TABLE circle.pipelines
    ADD COLUMN IF NOT EXISTS timeout_seconds INTEGER DEFAULT 3600,
    ADD COLUMN IF NOT EXISTS max_retries_per_node INTEGER DEFAULT 3,
    ADD COLUMN IF NOT EXISTS retry_backoff_base FLOAT DEFAULT 1.0,
    ADD COLUMN IF NOT EXISTS retry_backoff_max FLOAT DEFAULT 60.0;
