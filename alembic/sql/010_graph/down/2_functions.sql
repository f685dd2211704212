-- == drop graph functions
DROP FUNCTION IF EXISTS circle.pipeline_versions_after_truncate();
DROP FUNCTION IF EXISTS circle.pipeline_versions_after_delete();
DROP FUNCTION IF EXISTS circle.pipeline_versions_before();
DROP FUNCTION IF EXISTS circle.pipelines_after();
DROP FUNCTION IF EXISTS circle.pipelines_accept();
DROP FUNCTION IF EXISTS circle.pipelines_before();
DROP FUNCTION IF EXISTS circle.is_replica();
DROP FUNCTION IF EXISTS circle.refuse_other_table(text, regclass);
DROP FUNCTION IF EXISTS circle.check_graph(jsonb, jsonb, boolean);
DROP FUNCTION IF EXISTS circle.refuse_unreadable(text, jsonb);
DROP FUNCTION IF EXISTS circle.edge_findings(jsonb);
DROP FUNCTION IF EXISTS circle.node_findings(jsonb);
DROP FUNCTION IF EXISTS circle.compile_graph(jsonb, jsonb);
DROP TYPE IF EXISTS circle.compiled_node;
DROP FUNCTION IF EXISTS circle.sort_graph(jsonb, jsonb);
DROP FUNCTION IF EXISTS circle.refuse_cycle(text[], integer[], integer[], integer[]);
DROP FUNCTION IF EXISTS circle.refuse_no_lists(jsonb, jsonb);
DROP FUNCTION IF EXISTS circle.node_types();
DROP FUNCTION IF EXISTS circle.surely_trimmed(text[]);
DROP FUNCTION IF EXISTS circle.begins_well(text);
DROP FUNCTION IF EXISTS circle.branch_label(text);
DROP FUNCTION IF EXISTS circle.trimmed(text);
DROP FUNCTION IF EXISTS circle.number_too_large(jsonb);
DROP FUNCTION IF EXISTS circle.nested_too_deep(jsonb);
DROP FUNCTION IF EXISTS circle.refuse_graph(text, text, jsonb, text, text);
DROP FUNCTION IF EXISTS circle.refuse_issues(jsonb);
DROP FUNCTION IF EXISTS circle.graph_issue(text, text, jsonb, text, text);

-- == pipelines: drop version, revision, max_running and status_changed_at
ALTER TABLE circle.pipelines DROP COLUMN IF EXISTS version, DROP COLUMN IF EXISTS revision, DROP COLUMN IF EXISTS max_running,
    DROP COLUMN IF EXISTS status_changed_at;
