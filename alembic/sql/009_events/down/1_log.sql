-- == drop pipeline_events and the functions with its row type
DROP FUNCTION IF EXISTS circle.page_of_events(bigint, xid8, bigint, integer);
DROP FUNCTION IF EXISTS circle.event_types();
DROP TABLE IF EXISTS circle.pipeline_events;
