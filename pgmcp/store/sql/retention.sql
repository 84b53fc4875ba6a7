-- name: expire_sessions
-- fence: the rows are locked FOR UPDATE, those that somebody works with are skipped; only then in_use() looks, with a snapshot
-- of its own, whether anything was accepted or carried since the statement began. $1 idle and $2 absolute age; $3 for
-- sessions that wait for their client: of HTTP+SSE, or before the end of their handshake; $4 how much later than noted a
-- session may have been used; all in seconds. $5 at most.
with old as materialized (
    select s.id, s.created_at < clock_timestamp() - make_interval(secs => $2) as aged
    from {schema}.sessions s
    where s.created_at < clock_timestamp() - make_interval(secs => $2)
       or (
           s.last_active_at < clock_timestamp() - make_interval(secs => least($3::float8, $1) + $4)
           and (
               s.last_active_at < clock_timestamp() - make_interval(secs => $1 + $4)
               or s.transport = 'sse'
               or not exists (select from {schema}.journal j where j.session = s.id and j.kind = 'initialized')
           )
           and not exists (select from {schema}.streams st where st.session = s.id and st.sink is not null)
           and not exists (select from {schema}.requests r where r.session + 0 = s.id and r.finished_at is null)
       )
    limit $5
    for update of s skip locked
)
delete from {schema}.sessions s
using old
where s.id = old.id and (old.aged or not {schema}.in_use(old.id))
returning s.id;

-- name: drop_dead_sinks
-- fence: the sink's node is over and never comes back under its id; whoever attached since has put its own there. Until it
-- was noticed its stream was carried, and its session used: the sessions' rows are locked first.
with gone as materialized (
    select st.id, st.session from {schema}.streams st
    join {schema}.nodes n on n.node_id = st.sink and n.state in ('left', 'dead')
    order by st.id
    limit $1
), held as materialized (
    select s.id from {schema}.sessions s
    where s.id in (select session from gone)
    order by s.id
    for no key update of s skip locked
), locked as materialized (
    select st.id, st.session
    from held
    join gone on gone.session = held.id
    join {schema}.streams st on st.id = gone.id
    join {schema}.nodes n on n.node_id = st.sink and n.state in ('left', 'dead')
    order by st.id
    for no key update of st skip locked
), dropped as (
    update {schema}.streams st set sink = null, released_at = clock_timestamp()
    from locked where st.id = locked.id
), noted as (
    update {schema}.sessions s set last_active_at = clock_timestamp() where s.id in (select session from locked)
)
select 1 from locked;

-- name: prune_streams
-- With their events, as long as those are few. Age counts from the end, or from when a client last let go: one that breaks
-- off comes back. Somebody may read slowly: then a stream stays. But neither keeps anything for ever.
delete from {schema}.streams
where id in (
    select id from {schema}.streams
    where closed_at < statement_timestamp() - make_interval(secs => $1)
      and (
          sink is null and coalesce(released_at, closed_at) < statement_timestamp() - make_interval(secs => $1)
          or closed_at < statement_timestamp() - make_interval(secs => 10 * $1)
      )
      and closed_at >= statement_timestamp() - make_interval(secs => $2)
      and next_seq - floor_seq <= 101
    order by closed_at
    limit $3
    for update skip locked
)
returning 1;

-- name: prune_long_streams
-- Finished streams with more events lose those first, the oldest before the newer ones: what is gone lies below the floor,
-- so that nobody takes the rest for the whole.
with long as materialized (
    select st.id from {schema}.streams st
    where st.closed_at < statement_timestamp() - make_interval(secs => $1)
      and (
          st.sink is null and coalesce(st.released_at, st.closed_at) < statement_timestamp() - make_interval(secs => $1)
          or st.closed_at < statement_timestamp() - make_interval(secs => 10 * $1)
      )
      and st.closed_at >= statement_timestamp() - make_interval(secs => $2)
      and st.next_seq - st.floor_seq > 101
    order by st.closed_at
    limit 10
    for no key update of st skip locked
), old as materialized (
    select e.stream, e.seq from long join {schema}.events e on e.stream = long.id
    order by e.stream, e.seq
    limit $3
), gone as (
    delete from {schema}.events e using old where e.stream = old.stream and e.seq = old.seq
), moved as (
    update {schema}.streams st
    set floor_seq = greatest(st.floor_seq, o.floor)
    from (select stream, max(seq) as floor from old group by stream) o
    where st.id = o.stream
)
select 1 from old;

-- name: prune_messages
delete from {schema}.requests
where id in (
    select id from {schema}.requests
    where stream is null and finished_at < statement_timestamp() - make_interval(secs => $1)
      and finished_at >= statement_timestamp() - make_interval(secs => $2)
    order by finished_at
    limit $3
    for update skip locked
)
returning 1;

-- name: prune_standalone
-- Age counts from delivery. A sweep that finds events delivered sets a mark behind them; when the mark is old enough, what
-- lies before it goes, and the next mark is set. So an event stays for one to two times $1 after its delivery was noted.
with due as materialized (
    select st.id, st.delivered_seq, st.marked_seq, st.marked_at
    from {schema}.streams st
    where st.kind = 'standalone'
      and (
          st.marked_at is null and st.marked_seq < st.delivered_seq
          or st.marked_at < clock_timestamp() - make_interval(secs => $1)
      )
    order by st.id
    limit $2
    for no key update of st skip locked
), old as materialized (
    select e.stream, e.seq
    from due d
    join {schema}.events e on e.stream = d.id and e.seq <= d.marked_seq
    where d.marked_at is not null
    order by e.stream, e.seq
    limit $2
), gone as (
    delete from {schema}.events e using old where e.stream = old.stream and e.seq = old.seq
), over as (
    -- those of which nothing is left before the mark
    select d.* from due d
    where (select count(*) from old) < $2 or d.id < (select old.stream from old order by old.stream desc limit 1)
), pruned as (
    update {schema}.streams st
    set floor_seq = greatest(st.floor_seq, (select max(old.seq) from old where old.stream = st.id)),
        marked_seq = case when o.id is null then st.marked_seq else o.delivered_seq end,
        marked_at = case
            when o.id is null then st.marked_at
            when o.marked_seq < o.delivered_seq then clock_timestamp()
        end
    from due d left join over o on o.id = d.id
    where st.id = d.id
)
select 1 from due union all select 1 from old;

-- name: prune_nodes
-- Rows of nodes that are over are kept for people: the last 25, for a week at most; and while they own sessions.
delete from {schema}.nodes
where node_id in (
    select n.node_id from {schema}.nodes n
    where n.state in ('left', 'dead')
      and not exists (select from {schema}.sessions s where s.owner = n.node_id)
      and (
          n.renewed_at < clock_timestamp() - interval '7 days'
          or n.node_id not in (
              select k.node_id from {schema}.nodes k where k.state in ('left', 'dead') order by k.renewed_at desc limit 25
          )
      )
    limit $1
    for update of n skip locked
)
returning 1;

-- name: prune_takeovers
-- The history goes back a week, and a hundred thousand changes at most. Only the oldest rows are looked at.
delete from {schema}.takeovers
where id in (
    select t.id from {schema}.takeovers t
    where t.id in (select o.id from {schema}.takeovers o order by o.id limit $1)
      and (
          t.at < clock_timestamp() - interval '7 days'
          or t.id <= (select max(m.id) from {schema}.takeovers m) - 100000
      )
    for update of t skip locked
)
returning 1;

-- name: snapshot_holders
-- What keeps dead versions in this database for longer than $1 seconds. A role that may not see other roles' activity
-- (pg_read_all_stats) gets NULLs there, and so no rows.
select 'connection' as kind, a.pid::text as name, a.application_name as application, a.usename::text as role, a.state,
    extract(epoch from a.xact_start)::float8 as since,
    extract(epoch from clock_timestamp() - a.xact_start)::float8 as age
from pg_stat_activity a
where a.datname = current_database() and a.backend_type = 'client backend' and a.pid <> pg_backend_pid()
  and (a.backend_xmin is not null or a.backend_xid is not null)
  and a.xact_start < clock_timestamp() - make_interval(secs => $1)
union all
select 'prepared transaction', p.gid, null, p.owner::text, null, extract(epoch from p.prepared)::float8,
    extract(epoch from clock_timestamp() - p.prepared)::float8
from pg_prepared_xacts p
where p.database = current_database() and p.prepared < clock_timestamp() - make_interval(secs => $1)
order by age desc
limit 10;
