-- name: join
-- No row comes back when the database needs a newer build ($8: what this one knows). The lock on the one row of
-- schema_range puts a join and a contract step in order: the one sees the node, or the other what it leaves. The lock on
-- the one row of cluster does so with other joins and a new name: the first node says what the cluster serves ($9), and
-- nobody joins who serves something else.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), fit as materialized (
    select r.needs from guard, {schema}.schema_range r where r.needs <= $8 for share of r
), held as materialized (
    select fit.needs, c.serves from fit, {schema}.cluster c for update of c
), named as (
    update {schema}.cluster c set serves = $9 from held where held.serves is null
), made as (
    insert into {schema}.nodes
        (node_id, name, address, state, expires_at, version, schema_revision, schema_oldest, schema_newest)
    select $1, $2, $3, 'joining', clock_timestamp() + make_interval(secs => $4), $5, $6, $7, $8 from held
    where coalesce(held.serves, $9) = $9
    on conflict (node_id) do nothing
)
select needs, coalesce(serves, $9) as serves from held;

-- name: renew
-- One autocommit statement in database time; no row means that the node was declared dead. $3 is when the line's backend
-- started. On the pool, while the line is down, it is null: that backend may serve others after the node's death, so only
-- the lease can tell then.
update {schema}.nodes
set renewed_at = clock_timestamp(),
    expires_at = clock_timestamp() + make_interval(secs => $2),
    line_pid = case when $3::timestamptz is not null then pg_backend_pid() end,
    line_started_at = $3
where node_id = $1 and state in ('joining', 'ready', 'draining')
returning extract(epoch from renewed_at)::float8 as at;

-- name: set_state
-- A node's states only go forward: a late try must not make a draining node ready.
update {schema}.nodes set state = $2
where node_id = $1 and state in ('joining', 'ready', 'draining')
  and array_position(array['joining', 'ready', 'draining', 'left', 'dead'], state)
      <= array_position(array['joining', 'ready', 'draining', 'left', 'dead'], $2)
returning state;

-- name: line_started
-- PostgreSQL resets its statistics when it has recovered from a crash, and only then by itself.
select a.backend_start, s.stats_reset as recovered_at
from pg_stat_activity a, pg_stat_archiver s
where a.pid = pg_backend_pid();

-- name: notify
-- Ids only. A transaction that only notifies is never flushed, so the instance-wide lock is held for microseconds.
select pg_notify(channel, payload) from unnest($1::text[], $2::text[]) as n (channel, payload);

-- name: probe
select pg_notify($1, $2);

-- name: nodes_called
-- The living nodes of this name, or the node of this id, also when it is over.
select node_id, name, address, state from {schema}.nodes
where node_id::text = $1 or name = $1 and state in ('joining', 'ready', 'draining')
order by started_at, node_id;

-- name: drain_node
update {schema}.nodes set state = 'draining' where node_id = $1 and state = 'ready' returning node_id;

-- name: no_older
-- From now on nobody joins who does not know $1, unless somebody lives who does not. The lock on the one row of schema_range
-- puts this in order with joins.
with held as materialized (
    select r.needs from {schema}.schema_range r for update of r
), older as materialized (
    select n.name from held, {schema}.nodes n
    where n.state in ('joining', 'ready', 'draining') and coalesce(n.schema_newest, n.schema_revision) < $1
    order by n.name limit 1
), raised as (
    update {schema}.schema_range r set needs = $1 from held
    where held.needs < $1 and not exists (select from older)
)
select name from older;

-- name: own_state
select state from {schema}.nodes where node_id = $1;
