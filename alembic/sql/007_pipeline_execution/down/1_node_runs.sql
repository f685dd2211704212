-- == drop pipeline_node_runs
DROP TABLE IF EXISTS circle.pipeline_node_runs;
