"""What ``RunRepository`` sends. The functions are in alembic/sql/009b_lifecycle/."""

from __future__ import annotations

from gathering_pipeline.repositories._call import Query

# A row comes as one JSON text, which Pydantic parses in one go: far quicker than sixteen columns are from the server
# through the driver and validation.
CREATE = "SELECT to_json(circle.create_run(%(pipeline_id)s, %(trigger_data)s::jsonb, %(key)s))::text"
START = "SELECT to_json(circle.start_run(%(run_id)s, %(token)s))::text"
CONCLUDE = "SELECT to_json(circle.conclude_run(%(run_id)s, %(status)s, %(error)s, %(token)s))::text"
FINISH = "SELECT to_json(circle.finish_run(%(run_id)s, %(token)s))::text"
START_NODE = "SELECT to_json(circle.start_node(%(run_id)s, %(node_id)s, %(data)s::jsonb, %(token)s))::text"
COMPLETE_NODE = "SELECT to_json(circle.complete_node(%(run_id)s, %(node_id)s, %(data)s::jsonb, %(token)s))::text"
SKIP_NODE = "SELECT to_json(circle.skip_node(%(run_id)s, %(node_id)s, %(token)s))::text"
FAIL_NODE = "SELECT to_json(circle.fail_node(%(run_id)s, %(node_id)s, %(error)s, %(retryable)s, %(token)s))::text"
ADVANCE = """
SELECT to_json(n)::text FROM circle.advance_run(%(run_id)s, %(results)s::jsonb, %(token)s) n
ORDER BY n.position, n.id"""
RECORD = "SELECT circle.record_results(%(run_id)s, %(results)s::jsonb, %(token)s)"
CLAIM = """
SELECT to_json(r)::text FROM circle.claim_runs(%(worker_id)s, make_interval(secs => %(lease)s), %(limit)s) r
ORDER BY r.id"""
HEARTBEAT = "SELECT circle.heartbeat_run(%(run_id)s, %(token)s, make_interval(secs => %(lease)s))"
RELEASE = "SELECT to_json(circle.release_run(%(run_id)s, %(token)s))::text"
RECOVER = "SELECT to_json(r)::text FROM circle.recover_runs(%(limit)s, %(max_claims)s) r ORDER BY r.id"
EXPIRE = "SELECT to_json(r)::text FROM circle.expire_runs(%(limit)s) r ORDER BY r.id"
APPEND_LOG = "SELECT circle.append_run_log(%(run_id)s, %(entry)s::jsonb, %(token)s)"
PURGE = "SELECT circle.purge_runs(make_interval(secs => %(older_than)s), %(limit)s)"

GET = Query("SELECT to_json(r)::text FROM circle.pipeline_runs r WHERE r.id = %(run_id)s")
NODES = Query("""
SELECT to_json(n)::text FROM circle.pipeline_node_runs n WHERE n.run_id = %(run_id)s ORDER BY n.position, n.id""")
READY = Query("""
SELECT to_json(n)::text FROM circle.startable_node_runs n JOIN circle.pipeline_runs r ON r.id = n.run_id
WHERE n.run_id = %(run_id)s AND r.status = 'running' AND (r.failed_node IS NULL OR n.retry_count > 0)
ORDER BY n.position, n.id""")
DEFINITION = Query("""
SELECT r.pipeline_version, v.nodes, v.edges FROM circle.pipeline_runs r
LEFT JOIN circle.pipeline_versions v ON v.pipeline_id = r.pipeline_id AND v.version = r.pipeline_version
WHERE r.id = %(run_id)s""")
SEARCH = Query("""
SELECT to_json(r)::text FROM circle.page_of_runs(%(pipeline)s, %(status)s, %(after)s, %(limit)s) r
ORDER BY r.id DESC""")
COUNTS = Query("SELECT status, count(*) FROM circle.pipeline_runs GROUP BY status")
STATISTICS = Query("""
SELECT status, count(*) AS runs,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY extract(epoch FROM completed_at - started_at))
           FILTER (WHERE status = 'completed' AND started_at IS NOT NULL) AS quantiles
FROM circle.pipeline_runs WHERE pipeline_id = %(pipeline)s GROUP BY status""")
