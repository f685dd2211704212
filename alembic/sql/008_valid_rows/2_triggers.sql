-- == create the functions of the checks
-- PL/pgSQL, which is prepared once in a transaction: PostgreSQL parses and compiles the expression of a CHECK in every statement that
-- changes the table, which costs more than the rest of a small update. So a table has one CHECK, and it is a call.
--
-- Python holds times of the years 1 to 9999. A day at each end is left out: the session's time zone may be ahead of UTC, or behind. (Some
-- time zones have seconds in the offsets of times before 1972, which only sessions in other ones can read.) The arguments are the least
-- and the greatest of some times. Inlined.
CREATE OR REPLACE FUNCTION circle.are_readable_times(p_first timestamptz, p_last timestamptz) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT p_first >= '0001-01-02 00:00:00+00' AND p_last < '9999-12-31 00:00:00+00'
$$;
CREATE OR REPLACE FUNCTION circle.is_valid_run(p_status text, p_duration_seconds integer, p_created_at timestamptz,
                                               p_started_at timestamptz, p_completed_at timestamptz)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN p_duration_seconds >= 0 AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL)
        AND p_completed_at >= p_started_at
        AND circle.are_readable_times(least(p_created_at, p_started_at, p_completed_at), greatest(p_created_at, p_started_at, p_completed_at));
END $$;
CREATE OR REPLACE FUNCTION circle.is_valid_node_run(p_node_type text, p_status text, p_retry_count integer, p_duration_ms integer,
                                                    p_started_at timestamptz, p_completed_at timestamptz)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN p_node_type = ANY ('{trigger,agent,condition,action,parallel,delay}') AND p_retry_count >= 0 AND p_duration_ms >= 0
        AND (p_status = ANY ('{pending,running}')) = (p_completed_at IS NULL)
        AND p_completed_at >= p_started_at
        AND circle.are_readable_times(least(p_started_at, p_completed_at), greatest(p_started_at, p_completed_at));
END $$;

-- == create the functions that fill in what writers omit
CREATE OR REPLACE FUNCTION circle.pipeline_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
        IF coalesce(NEW.duration_seconds, 0) = 0 THEN
            NEW.duration_seconds := least(coalesce(extract(epoch FROM NEW.completed_at - NEW.started_at), 0), 2147483647)::integer;
        END IF;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipeline_node_runs_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.status NOT IN ('pending', 'running') THEN
        NEW.completed_at := coalesce(NEW.completed_at, greatest(clock_timestamp(), NEW.started_at));
    END IF;
    RETURN NEW;
END $$;

-- == pipeline_runs: fill in the end of a run
CREATE OR REPLACE TRIGGER pipeline_runs_before BEFORE INSERT OR UPDATE OF status ON circle.pipeline_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_runs_before();
ALTER TABLE circle.pipeline_runs ENABLE ALWAYS TRIGGER pipeline_runs_before;

-- == pipeline_node_runs: fill in the end of a node run
CREATE OR REPLACE TRIGGER pipeline_node_runs_before BEFORE UPDATE OF status ON circle.pipeline_node_runs
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_node_runs_before();
CREATE OR REPLACE TRIGGER pipeline_node_runs_before_insert BEFORE INSERT ON circle.pipeline_node_runs
    FOR EACH ROW WHEN (NEW.status <> 'pending') EXECUTE FUNCTION circle.pipeline_node_runs_before();
ALTER TABLE circle.pipeline_node_runs ENABLE ALWAYS TRIGGER pipeline_node_runs_before,
                                      ENABLE ALWAYS TRIGGER pipeline_node_runs_before_insert;
