-- == drop graph-check and JSON-check functions
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_json();
DROP FUNCTION IF EXISTS circle.pipeline_runs_json();
DROP FUNCTION IF EXISTS circle.refuse_json(text, name, name);
DROP FUNCTION IF EXISTS circle.pipelines_accept();
DROP FUNCTION IF EXISTS circle.check_graph(jsonb, jsonb, boolean);
DROP FUNCTION IF EXISTS circle.refuse_unreadable(text, jsonb);
DROP FUNCTION IF EXISTS circle.begins_well(text);
DROP FUNCTION IF EXISTS circle.edge_findings(jsonb);
DROP FUNCTION IF EXISTS circle.surely_trimmed(text[]);
DROP FUNCTION IF EXISTS circle.node_findings(jsonb);
DROP FUNCTION IF EXISTS circle.trimmed(text);
DROP FUNCTION IF EXISTS circle.number_too_large(jsonb);
DROP FUNCTION IF EXISTS circle.nested_too_deep(jsonb);
