-- == drop the tables that this revision created, keep those that it adopted
DO $drop$
DECLARE
    tab text;
BEGIN
    FOREACH tab IN ARRAY ARRAY['circle.pipeline_runs', 'circle.pipelines'] LOOP
        IF obj_description(to_regclass(tab), 'pg_class') = 'created by gathering_pipeline revision 006_pipelines' THEN
            EXECUTE format('DROP TABLE %s', tab);
        END IF;
    END LOOP;
END $drop$;
