-- name: expire_sessions
-- fence: DELETE locks the rows FOR UPDATE; those that somebody works with are skipped. $1 idle and $2 absolute age,
-- $3 for HTTP+SSE sessions whose stream nobody carries, in seconds.
delete from {schema}.sessions
where id in (
    select s.id
    from {schema}.sessions s
    where s.created_at < clock_timestamp() - make_interval(secs => $2)
       or (
           s.last_active_at < clock_timestamp()
               - make_interval(secs => case when s.transport = 'sse' then least($3::float8, $1) else $1 end)
           and not exists (select from {schema}.streams st where st.session = s.id and st.sink is not null)
           and not exists (select from {schema}.requests r where r.session = s.id and r.finished_at is null)
       )
    limit 100
    for update of s skip locked
)
returning id;

-- name: drop_dead_sinks
-- fence: the sink's node is over and never comes back under its id; whoever attached since has put its own there.
update {schema}.streams
set sink = null
where id in (
    select st.id from {schema}.streams st
    join {schema}.nodes n on n.node_id = st.sink and n.state in ('left', 'dead')
    order by st.id
    limit 500
    for no key update of st skip locked
)
returning 1;

-- name: prune_streams
delete from {schema}.streams
where id in (
    select id from {schema}.streams
    where closed_at < clock_timestamp() - make_interval(secs => $1)
      -- somebody reads slowly; a sink that was never let go keeps nothing for ever
      and (sink is null or closed_at < clock_timestamp() - make_interval(secs => 10 * $1))
    order by closed_at
    limit 500
    for update skip locked
)
returning 1;

-- name: prune_messages
delete from {schema}.requests
where id in (
    select id from {schema}.requests
    where stream is null and finished_at < clock_timestamp() - make_interval(secs => $1)
    order by finished_at
    limit 500
    for update skip locked
)
returning 1;

-- name: prune_standalone
with floors as (
    select st.id, st.delivered_seq
    from {schema}.streams st
    where st.kind = 'standalone' and st.floor_seq < st.delivered_seq
    order by st.id
    limit 500
    for no key update skip locked
), old as (
    delete from {schema}.events e
    using floors f
    where e.stream = f.id and e.seq <= f.delivered_seq
      and e.stored_at < clock_timestamp() - make_interval(secs => $1)
    returning e.stream, e.seq
)
update {schema}.streams st
set floor_seq = greatest(st.floor_seq, o.floor)
from (select stream, max(seq) as floor from old group by stream) o
where st.id = o.stream
returning 1;
