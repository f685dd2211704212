-- == drop trigger functions
DROP FUNCTION IF EXISTS circle.pipeline_runs_before();
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_before();
