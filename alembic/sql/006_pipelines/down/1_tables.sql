-- == drop the tables that this revision created, keep those that it adopted
DO $drop$
DECLARE
    tab text;
BEGIN
    FOREACH tab IN ARRAY ARRAY['circle.pipeline_runs', 'circle.pipelines'] LOOP
        IF EXISTS (
            SELECT FROM pg_constraint WHERE conrelid = to_regclass(tab) AND contype = 'p'
                AND obj_description(oid, 'pg_constraint') = 'created by gathering_pipeline revision 006_pipelines'
        ) THEN
            EXECUTE format('DROP TABLE %s', tab);
        END IF;
    END LOOP;
END $drop$;
