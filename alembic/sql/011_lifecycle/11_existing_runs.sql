-- Revision 011: the runs that were there before.

-- == pipeline_counters: count the existing runs
-- The triggers count already. One statement sees runs and counters of the same moment, and adds what is missing.
INSERT INTO circle.pipeline_counters (pipeline_id, pending, running, completed, failed, cancelled, timeout)
SELECT pipeline_id, coalesce(r.pending, 0) - coalesce(c.pending, 0), coalesce(r.running, 0) - coalesce(c.running, 0),
       coalesce(r.completed, 0) - coalesce(c.completed, 0), coalesce(r.failed, 0) - coalesce(c.failed, 0),
       coalesce(r.cancelled, 0) - coalesce(c.cancelled, 0), coalesce(r.timeout, 0) - coalesce(c.timeout, 0)
FROM (SELECT pipeline_id, count(*) FILTER (WHERE status = 'pending') AS pending, count(*) FILTER (WHERE status = 'running') AS running,
             count(*) FILTER (WHERE status = 'completed') AS completed, count(*) FILTER (WHERE status = 'failed') AS failed,
             count(*) FILTER (WHERE status = 'cancelled') AS cancelled, count(*) FILTER (WHERE status = 'timeout') AS timeout
      FROM circle.pipeline_runs GROUP BY pipeline_id) r
FULL JOIN (SELECT pipeline_id, sum(pending) AS pending, sum(running) AS running, sum(completed) AS completed, sum(failed) AS failed,
                  sum(cancelled) AS cancelled, sum(timeout) AS timeout
           FROM circle.pipeline_counters GROUP BY pipeline_id) c USING (pipeline_id)
WHERE (r.pending, r.running, r.completed, r.failed, r.cancelled, r.timeout)
      IS DISTINCT FROM (c.pending, c.running, c.completed, c.failed, c.cancelled, c.timeout);

-- == pipeline_runs: note the node that failed first in live runs
UPDATE circle.pipeline_runs r SET failed_node = (
    SELECT n.node_id FROM circle.pipeline_node_runs n WHERE n.run_id = r.id AND n.status = 'failed' ORDER BY n.position, n.id LIMIT 1)
WHERE r.status IN ('pending', 'running') AND r.failed_node IS NULL
  AND EXISTS (SELECT FROM circle.pipeline_node_runs n WHERE n.run_id = r.id AND n.status = 'failed');

-- == pipeline_runs: bind pending runs to the graph of their pipeline, so that they can be claimed
-- Running ones were begun by a writer that may keep no nodes: it ends them as before.
UPDATE circle.pipeline_runs r SET pipeline_version = v.version
FROM circle.pipelines p JOIN circle.pipeline_versions v ON v.pipeline_id = p.id AND v.version = p.version
WHERE r.pipeline_id = p.id AND r.status = 'pending' AND r.pipeline_version IS NULL;
