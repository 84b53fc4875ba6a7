-- name: condemn
-- Death, in database time: one guarded statement, after which the node's own renewal hits no live row. $2: this observer
-- may say so of a lease that ran out; $3: of a node that was silent for $4 seconds and whose line has no backend any more
-- (a backend_start that this role may not see counts as alive). A row that is being renewed is locked, and skipped. Nothing
-- by an observer that is silent itself: it slept through an outage, or the database's clock has just jumped.
with suspects as materialized (
    select n.node_id,
        case when n.expires_at < clock_timestamp() then 'lease' else 'silence' end as cause
    from {schema}.nodes n
    where n.node_id <> $1
      and n.state in ('joining', 'ready', 'draining')
      and (
          $2 and n.expires_at < clock_timestamp()
          or $3 and n.line_pid is not null
              and n.renewed_at < clock_timestamp() - make_interval(secs => $4)
              and not exists (
                  select from pg_stat_activity a
                  where a.pid = n.line_pid and (a.backend_start is null or a.backend_start = n.line_started_at)
              )
      )
    order by n.node_id
    for no key update of n skip locked
)
update {schema}.nodes n
set state = 'dead', cause = s.cause
from suspects s
where n.node_id = s.node_id
  and exists (
      select from {schema}.nodes me
      where me.node_id = $1 and me.state in ('joining', 'ready', 'draining')
        and me.renewed_at >= clock_timestamp() - make_interval(secs => $4)
  )
returning n.node_id, n.name, n.cause;

-- name: take_session
-- fence: the session's row FOR UPDATE; what is in flight is read by later statements only. A node that is dead, left or
-- removed never comes back under its id, so its row needs no lock. A repeat finds itself as the owner and takes nothing.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), seen as materialized (
    select s.id, s.epoch, coalesce(n.cause, n.state, 'removed') as reason
    from {schema}.sessions s
    left join {schema}.nodes n on n.node_id = s.owner
    where s.id = $1
      and (n.state in ('joining', 'ready', 'draining')) is not true
      and exists (select from {schema}.nodes me where me.node_id = $2 and me.state = 'ready')
), held as materialized (
    -- whoever waited for the lock and finds another epoch has come too late
    select s.id, s.session_id, s.owner, s.epoch, seen.reason
    from guard, seen join {schema}.sessions s on s.id = seen.id and s.epoch = seen.epoch
    for update of s
), taken as (
    update {schema}.sessions s
    set owner = $2, epoch = held.epoch + 1
    from held where s.id = held.id
    returning s.id, s.epoch
), noted as (
    insert into {schema}.takeovers (session, session_id, from_node, to_node, epoch, reason)
    select held.id, held.session_id, held.owner, $2, taken.epoch, held.reason
    from held join taken on taken.id = held.id
)
select s.id, case when taken.id is null then s.owner else $2 end as owner,
    coalesce(taken.epoch, s.epoch) as epoch, s.protocol_version,
    taken.id is null and (n.state in ('joining', 'ready', 'draining')) is not true as orphaned
from {schema}.sessions s
left join taken on taken.id = s.id
left join {schema}.nodes n on n.node_id = s.owner
where s.id = $1;

-- name: take_orphans
-- fence: the sessions' rows FOR UPDATE, locked ones skipped. Only those that somebody waits for: work in flight, a stream
-- that a live node carries, a subscription; those with work come first. $2 is how many at most.
with held as materialized (
    select s.id, s.session_id, s.owner, s.epoch, coalesce(n.cause, n.state) as reason
    from {schema}.nodes n
    join {schema}.sessions s on s.owner = n.node_id
    where n.state in ('left', 'dead')
      and exists (select from {schema}.nodes me where me.node_id = $1 and me.state = 'ready')
      and (
          exists (select from {schema}.requests r where r.session + 0 = s.id and r.finished_at is null)
          or exists (
              select from {schema}.streams st join {schema}.nodes k on k.node_id = st.sink
              where st.session = s.id and not st.closed and k.state in ('joining', 'ready', 'draining')
          )
          or exists (select from {schema}.journal j where j.session = s.id and j.kind = 'subscription')
      )
    order by exists (select from {schema}.requests r where r.session + 0 = s.id and r.finished_at is null) desc, s.id
    limit $2
    for update of s skip locked
), taken as (
    update {schema}.sessions s
    set owner = $1, epoch = held.epoch + 1
    from held where s.id = held.id
    returning s.id, s.epoch
), noted as (
    insert into {schema}.takeovers (session, session_id, from_node, to_node, epoch, reason)
    select held.id, held.session_id, held.owner, $1, taken.epoch, held.reason
    from held join taken on taken.id = held.id
)
select t.id, t.epoch from taken t
order by exists (select from {schema}.requests r where r.session + 0 = t.id and r.finished_at is null) desc, t.id;

-- name: restores_begun
select restores from {schema}.sessions where id = $1;

-- name: begin_restore
-- fence: owner and epoch on the sessions row. The attempt after $4 others is counted before it is made; a repeat finds it
-- counted.
update {schema}.sessions s
set restores = $4 + 1
where s.id = $1 and s.owner = $2 and s.epoch = $3 and s.restores in ($4, $4 + 1)
returning s.session_id, s.restores;

-- name: end_restore
-- fence: owner and epoch on the sessions row. What was exported for this restore ($5: when) is old from now on. $4 is the
-- attempt that has succeeded; a late first try must neither end a newer one nor forget a newer export.
with done as (
    update {schema}.sessions s
    set restores = 0
    where s.id = $1 and s.owner = $2 and s.epoch = $3 and s.restores in (0, $4)
    returning s.id
), used as (
    delete from {schema}.journal j using done
    where j.session = done.id and j.kind = 'export' and j.written_at <= $5::timestamptz
)
select id from done;

-- name: inherited_journal
select kind, detail, body, written_at from {schema}.journal where session = $1 order by written_at, kind, detail;

-- name: inherited_streams
select id, kind, next_seq, sink from {schema}.streams
where session = $1 and (kind = 'standalone' or sink is not null);

-- name: inherited_requests
-- What may have been started: what an earlier owner claimed (or this one, in a restore that failed), and, since claims
-- commit asynchronously, whatever was accepted before PostgreSQL last came up (its statistics are reset after a crash) or
-- before another server became the primary.
select r.id, r.position, r.rpc_id, r.method, r.name, r.body, r.context, r.stream, r.runs, st.next_seq
from {schema}.requests r
left join {schema}.streams st on st.id = r.stream
where r.session = $1
  and r.rpc_id is not null
  and r.finished_at is null
  and (
      r.claimed_epoch <= $2
      or r.claimed_epoch is null and (
          r.accepted_at < greatest(pg_postmaster_start_time(), (select stats_reset from pg_stat_bgwriter))
          or r.position <= (select h.position from {schema}.history h)
      )
  )
order by r.position;

-- name: inherited_heard
-- What the client has said besides requests, as far as it matters for those that an earlier owner left: answers, cancels,
-- and the end of the handshake. The newest first.
select id, position, method, body, claimed_epoch is not null as claimed from {schema}.requests
where session = $1
  and rpc_id is null
  and (method is null or method in ('notifications/cancelled', 'notifications/initialized'))
order by position desc
limit 1000;

-- name: inherited_said
-- What an earlier owner has said on these streams, as far as it matters: questions, cancels of its own, progress. The
-- newest first; not what has more than a megabyte, which is an answer or a question that stays open at the client. Of
-- what is sealed the second byte tells.
select st.id as stream, e.seq, e.message
from unnest($1::uuid[]) as st (id)
cross join lateral (
    select q.seq, q.message from {schema}.events q
    where q.stream = st.id
      and octet_length(q.message) <= 1048576
      and (
          position('"id":'::bytea in q.message) > 0 and position('"method":'::bytea in q.message) > 0
          or position('"notifications/cancelled"'::bytea in q.message) > 0
          or position('"notifications/progress"'::bytea in q.message) > 0
          or substring(q.message from 1 for 2) = '\x0003'::bytea
      )
    order by q.seq desc
    limit 1000
) e;

-- name: inherited_changes
-- Which lists have changed since the session began: its owners may have heard of it and not told.
select distinct p.kind
from {schema}.publications p
where p.kind <> 'resource_updated'
  and p.published_at >= (select s.created_at from {schema}.sessions s where s.id = $1);

-- name: adopt
-- fence: owner and epoch on the sessions row, FOR KEY SHARE. What an earlier owner may have started is this one's now, to
-- be run once more or to be ended: $5 counts its runs with the one that comes, before it is made; runs only grow.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id, s.epoch from guard, {schema}.sessions s
    where s.id = $1 and s.owner = $2 and s.epoch = $3
    for key share of s
), adopted as (
    update {schema}.requests r
    set claimed_epoch = held.epoch, claimed_at = clock_timestamp(), runs = a.runs
    from held, unnest($4::uuid[], $5::integer[]) as a (id, runs)
    where r.id = a.id and r.session = held.id and r.finished_at is null and r.runs <= a.runs
)
select id from held;

-- name: ready_nodes
select n.node_id, n.version, (select count(*) from {schema}.sessions s where s.owner = n.node_id) as sessions
from {schema}.nodes n
where n.state = 'ready' and n.node_id <> $1;

-- name: hand_over
-- fence: owner and epoch on the sessions row, FOR UPDATE. The owner itself knows that nothing of it is being written; what
-- it has claimed and not finished is inherited. A repeat finds the session with its new owner.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id, s.session_id, s.epoch from guard, {schema}.sessions s
    where s.id = $1 and s.owner = $2 and s.epoch = $3
      and exists (select from {schema}.nodes n where n.node_id = $4 and n.state = 'ready')
    for update of s
), moved as (
    update {schema}.sessions s
    set owner = $4, epoch = held.epoch + 1
    from held where s.id = held.id
    returning s.id, s.epoch
), noted as (
    insert into {schema}.takeovers (session, session_id, from_node, to_node, epoch, reason)
    select held.id, held.session_id, $2, $4, moved.epoch, 'drain' from held join moved on moved.id = held.id
)
select coalesce(moved.epoch, s.epoch) as epoch
from {schema}.sessions s left join moved on moved.id = s.id
where s.id = $1 and (moved.id is not null or s.owner = $4 and s.epoch = $3 + 1);
