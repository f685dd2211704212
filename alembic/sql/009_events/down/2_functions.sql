-- == drop event functions
DROP FUNCTION IF EXISTS circle.node_event(text);
DROP FUNCTION IF EXISTS circle.run_event(text);
DROP FUNCTION IF EXISTS circle.purge_events(interval, integer);
DROP FUNCTION IF EXISTS circle.reset_event_xids();
DROP FUNCTION IF EXISTS circle.notify_events(boolean);
DROP FUNCTION IF EXISTS circle.pipeline_events_notify();
DROP FUNCTION IF EXISTS circle.pipeline_events_frozen();
DROP FUNCTION IF EXISTS circle.event_xid();
