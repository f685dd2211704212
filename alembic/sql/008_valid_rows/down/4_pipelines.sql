-- == pipelines: drop checks
ALTER TABLE circle.pipelines
    ALTER COLUMN status DROP NOT NULL, ALTER COLUMN nodes DROP NOT NULL, ALTER COLUMN edges DROP NOT NULL,
    ALTER COLUMN run_count DROP NOT NULL, ALTER COLUMN success_count DROP NOT NULL,
    ALTER COLUMN error_count DROP NOT NULL, ALTER COLUMN max_retries_per_node DROP NOT NULL,
    ALTER COLUMN retry_backoff_base DROP NOT NULL, ALTER COLUMN retry_backoff_max DROP NOT NULL,
    DROP CONSTRAINT IF EXISTS tmp_pipelines_not_null,
    DROP CONSTRAINT IF EXISTS ck_pipelines;
