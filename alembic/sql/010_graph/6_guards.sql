-- Revision 010: every writer is refused an invalid graph, and a version that the compiler didn't make.

-- == create functions of guards
-- Trigger functions run with the rights of their owner, so that writers need none on the tables that only triggers write. Hence
-- they serve no table but their own.
CREATE OR REPLACE FUNCTION circle.refuse_other_table(p_function text, p_table regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'circle.% can''t be a trigger of %', p_function, p_table USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE OR REPLACE FUNCTION circle.is_replica() RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT current_setting('session_replication_role') = 'replica'
$$;

-- == create trigger functions of pipelines and versions
-- Numbers the graphs and the revisions of the row: 1 for the first, one more for each other. An UPDATE may set the revision that its
-- writer has read, to be refused if the row has another one by now: PL009. Notes when the status changed. Replicas keep the revision and
-- the time that they are given.
CREATE OR REPLACE FUNCTION circle.pipelines_before() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        NEW.version := OLD.version + (NEW.nodes IS DISTINCT FROM OLD.nodes OR NEW.edges IS DISTINCT FROM OLD.edges)::integer;
        IF circle.is_replica() THEN
            RETURN NEW;
        ELSIF NEW.revision <> OLD.revision THEN
            RAISE EXCEPTION 'pipeline % is at revision %, not %', OLD.id, OLD.revision, NEW.revision
                USING ERRCODE = 'PL009', DETAIL = jsonb_build_object('pipeline_id', OLD.id, 'expected', NEW.revision,
                                                                     'current', OLD.revision);
        END IF;
        NEW.status_changed_at := CASE WHEN NEW.status IS DISTINCT FROM OLD.status THEN clock_timestamp() ELSE OLD.status_changed_at END;
        NEW.revision := NEW.revision + (
            NEW.version <> OLD.version OR NEW.status IS DISTINCT FROM OLD.status OR NEW.name IS DISTINCT FROM OLD.name
            OR NEW.description IS DISTINCT FROM OLD.description OR NEW.timeout_seconds IS DISTINCT FROM OLD.timeout_seconds
            OR NEW.max_retries_per_node IS DISTINCT FROM OLD.max_retries_per_node
            OR NEW.retry_backoff_base IS DISTINCT FROM OLD.retry_backoff_base
            OR NEW.retry_backoff_max IS DISTINCT FROM OLD.retry_backoff_max OR NEW.max_running <> OLD.max_running)::integer;
    ELSIF NOT circle.is_replica() THEN
        NEW.version := 1;
        NEW.revision := 1;
        NEW.status_changed_at := clock_timestamp();
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE FUNCTION circle.pipelines_accept() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' OR NEW.version IS DISTINCT FROM OLD.version THEN
        PERFORM circle.check_graph(NEW.nodes, NEW.edges, NEW.status = 'active');
        IF circle.is_replica() THEN
            PERFORM circle.sort_graph(NEW.nodes, NEW.edges);   -- else it is sorted when the version is written
        END IF;
    ELSIF NEW.status = 'active' AND OLD.status <> 'active' THEN
        PERFORM circle.check_graph(NEW.nodes, NEW.edges, true);
        PERFORM circle.sort_graph(NEW.nodes, NEW.edges);
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION circle.pipelines_after() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'circle.pipelines'::regclass THEN
        PERFORM circle.refuse_other_table('pipelines_after', TG_RELID);
    END IF;
    INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges) VALUES (NEW.id, NEW.version, NEW.nodes, NEW.edges);
    RETURN NULL;
END $$;
-- A version is what the compiler makes of the pipeline's graph, not of what is inserted; a replica may get its pipeline later.
CREATE OR REPLACE FUNCTION circle.pipeline_versions_before() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        RAISE EXCEPTION 'versions of a pipeline are immutable' USING ERRCODE = 'integrity_constraint_violation';
    ELSIF NOT circle.is_replica() AND NOT EXISTS (
            SELECT FROM circle.pipelines p WHERE p.id = NEW.pipeline_id AND p.version = NEW.version
                                             AND p.nodes = NEW.nodes AND p.edges = NEW.edges) THEN
        RAISE EXCEPTION 'version % is not the graph of pipeline %: change nodes and edges of the pipeline, which writes a version',
            NEW.version, NEW.pipeline_id USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    NEW.compiled := circle.compile_graph(NEW.nodes, NEW.edges);
    NEW.node_count := cardinality(NEW.compiled);
    RETURN NEW;
END $$;
-- A version goes with its pipeline, or once neither the pipeline nor a run names it. Runs are created under the same lock.
CREATE OR REPLACE FUNCTION circle.pipeline_versions_after_delete() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'circle.pipeline_versions'::regclass THEN
        PERFORM circle.refuse_other_table('pipeline_versions_after_delete', TG_RELID);
    ELSIF EXISTS (SELECT FROM circle.pipelines WHERE id = OLD.pipeline_id) THEN
        PERFORM pg_advisory_xact_lock(1734964328, hashint8(OLD.pipeline_id));
        IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
            -- its snapshot doesn't see the runs that it waited for
            RAISE EXCEPTION 'versions can''t be deleted at isolation level %', current_setting('transaction_isolation')
                USING ERRCODE = 'PL011', DETAIL = jsonb_build_object('level', current_setting('transaction_isolation'));
        END IF;
        IF EXISTS (SELECT FROM circle.pipelines WHERE id = OLD.pipeline_id AND version = OLD.version) THEN
            RAISE EXCEPTION 'version % is the current one of pipeline %', OLD.version, OLD.pipeline_id
                USING ERRCODE = 'integrity_constraint_violation';
        ELSIF EXISTS (SELECT FROM circle.pipeline_runs WHERE pipeline_id = OLD.pipeline_id AND pipeline_version = OLD.version) THEN
            RAISE EXCEPTION 'runs of pipeline % have version %', OLD.pipeline_id, OLD.version
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
    END IF;
    RETURN NULL;
END $$;
-- Neither events nor versions have a foreign key that takes them along in TRUNCATE ... CASCADE of less than all.
CREATE OR REPLACE FUNCTION circle.pipeline_versions_after_truncate() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM circle.pipelines) THEN
        RAISE EXCEPTION 'pipelines would be left without versions: TRUNCATE circle.pipelines CASCADE empties all tables'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION circle.pipelines_after(), circle.pipeline_versions_after_delete() FROM PUBLIC;

-- == pipeline_versions: guard rows
CREATE OR REPLACE TRIGGER pipeline_versions_before BEFORE INSERT OR UPDATE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_before();
CREATE OR REPLACE TRIGGER pipeline_versions_after_delete AFTER DELETE ON circle.pipeline_versions
    FOR EACH ROW EXECUTE FUNCTION circle.pipeline_versions_after_delete();
CREATE OR REPLACE TRIGGER pipeline_versions_after_truncate AFTER TRUNCATE ON circle.pipeline_versions
    FOR EACH STATEMENT EXECUTE FUNCTION circle.pipeline_versions_after_truncate();
ALTER TABLE circle.pipeline_versions ENABLE ALWAYS TRIGGER pipeline_versions_before;

-- == pipelines: check graphs on write, and write a version for each new graph
-- pipelines_accept fires before pipelines_after_*, which compile. Both have a column list, because without one they would run for every
-- counter update.
CREATE OR REPLACE TRIGGER pipelines_before
    BEFORE INSERT OR UPDATE OF name, description, status, nodes, edges, timeout_seconds, max_retries_per_node, retry_backoff_base,
        retry_backoff_max, max_running, version, revision, status_changed_at
    ON circle.pipelines FOR EACH ROW EXECUTE FUNCTION circle.pipelines_before();
CREATE OR REPLACE TRIGGER pipelines_accept AFTER INSERT OR UPDATE OF nodes, edges, status ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_accept();
CREATE OR REPLACE TRIGGER pipelines_after_insert AFTER INSERT ON circle.pipelines
    FOR EACH ROW EXECUTE FUNCTION circle.pipelines_after();
CREATE OR REPLACE TRIGGER pipelines_after_update AFTER UPDATE ON circle.pipelines
    FOR EACH ROW WHEN (OLD.version IS DISTINCT FROM NEW.version) EXECUTE FUNCTION circle.pipelines_after();
ALTER TABLE circle.pipelines ENABLE ALWAYS TRIGGER pipelines_before, ENABLE ALWAYS TRIGGER pipelines_accept;

-- == pipelines: write the versions of existing graphs
DO $versions$
DECLARE
    pipeline_id integer;
    p circle.pipelines;
BEGIN
    FOR pipeline_id IN SELECT id FROM circle.pipelines ORDER BY id LOOP
        BEGIN
            SELECT * INTO p FROM circle.pipelines WHERE id = pipeline_id FOR NO KEY UPDATE;
            IF FOUND AND NOT EXISTS (SELECT FROM circle.pipeline_versions v
                                     WHERE v.pipeline_id = p.id AND v.version = p.version) THEN
                INSERT INTO circle.pipeline_versions (pipeline_id, version, nodes, edges)
                VALUES (p.id, p.version, p.nodes, p.edges);
            END IF;
        EXCEPTION WHEN SQLSTATE 'PL008' THEN
            RAISE WARNING 'circle.pipelines id % can''t be run until its graph is repaired: %', p.id, SQLERRM;
        END;
        COMMIT;
    END LOOP;
END $versions$;
