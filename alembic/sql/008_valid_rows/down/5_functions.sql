-- == drop trigger functions
DROP FUNCTION IF EXISTS circle.pipeline_runs_before();
DROP FUNCTION IF EXISTS circle.pipeline_node_runs_before();
DROP FUNCTION IF EXISTS circle.is_valid_run(text, integer, timestamptz, timestamptz, timestamptz);
DROP FUNCTION IF EXISTS circle.is_valid_node_run(text, text, integer, integer, timestamptz, timestamptz);
DROP FUNCTION IF EXISTS circle.are_readable_times(timestamptz, timestamptz);
