-- name: publish
-- The ids are the publisher's: a repeat finds its rows. Nobody is notified here: the wake-up goes apart.
insert into {schema}.publications (id, kind, uri)
select a.id, a.kind, a.uri from unnest($1::uuid[], $2::text[], $3::text[]) with ordinality as a (id, kind, uri, n)
order by a.n
on conflict (id) do nothing;

-- name: publish_and_notify
-- For publishers outside of any node, on a connection of their own.
with stored as (
    insert into {schema}.publications (kind, uri)
    select a.kind, a.uri from unnest($1::text[], $2::text[]) with ordinality as a (kind, uri, n)
    order by a.n
    returning 1
)
select pg_notify($3::text, $4::text) from (select count(*) from stored) s;

-- name: read_publications
-- What was committed since the snapshot $1, each row once: a cursor over ids or times would pass over rows that commit
-- late. $2 of them at most. Rows that a dump of another server brought along may stand beyond this one's transactions.
select s.horizon, p.kind, p.uri
from (select pg_current_snapshot()::text as horizon) s
left join lateral (
    select p.kind, p.uri, p.xact, p.published_at, p.id
    from {schema}.publications p
    where p.xact >= coalesce(pg_snapshot_xmin($1::text::pg_snapshot)::text::bigint, 0)
      and p.xact < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
      and pg_visible_in_snapshot(p.xact::text::xid8, $1::text::pg_snapshot) is not true
    order by p.xact, p.published_at, p.id
    limit $2
) p on true
order by p.xact, p.published_at, p.id;

-- name: horizon
select pg_current_snapshot()::text as horizon;

-- name: prune_publications
-- $2 is a horizon of $1 seconds ago or earlier: what a long transaction published is new when it commits, however old it
-- is, and is kept as long as any other from then on. The newest change of each list stays, for sessions that change their owner later; so do, with an unknown horizon, all.
with newest as materialized (
    select kind, max(published_at) as at from {schema}.publications where kind <> 'resource_updated' group by kind
)
delete from {schema}.publications
where id in (
    select p.id
    from {schema}.publications p
    left join newest w on w.kind = p.kind
    where p.published_at < clock_timestamp() - make_interval(secs => $1)
      and (w.at is null or p.published_at < w.at)
      and (
          pg_visible_in_snapshot(p.xact::text::xid8, $2::text::pg_snapshot)
          or p.xact >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
      )
    order by p.xact
    limit $3
    for update of p skip locked
)
returning 1;
