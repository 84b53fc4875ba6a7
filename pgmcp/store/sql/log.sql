-- name: append
-- fence: owner and epoch on the sessions row, FOR KEY SHARE, in id order; then the streams' rows in id order.
-- An entry is stored only where its stream stands at the expected number; an answer only together with the
-- compare-and-set that finishes its request (whose claim a crash of PostgreSQL may have forgotten). A repeat finds its own events and reports them as stored. An event with a
-- topic replaces a waiting one of the same topic, which is no loss. Only the last $10 numbers of events with a topic may
-- wait, $12 while somebody carries the stream: what is cut lies below the floor then, so that a reader is told. A request
-- that ends was use of its session until now, noted once in $11 seconds. "is true" keeps the planner from reading every
-- session of the owner.
with guard as materialized (
    select set_config('lock_timeout', '{lock_wait}', true)
), asked as materialized (
    select *
    from unnest($1::bigint[], $2::bigint[], $3::uuid[], $4::bigint[], $6::uuid[], $7::text[], $9::text[])
        with ordinality as a (session, epoch, stream, seq, finishes, outcome, topic, n)
), held as materialized (
    select s.id, s.epoch, s.last_active_at
    from guard, {schema}.sessions s
    where s.id in (select session from asked) and (s.owner = $8) is true
    order by s.id
    for key share of s
), fit as materialized (
    select a.* from asked a join held h on h.id = a.session and h.epoch = a.epoch
), locked as materialized (
    select st.id, st.session, st.kind, st.next_seq, st.delivered_seq, st.floor_seq, st.sink, st.sink_epoch, st.closed
    from {schema}.streams st
    where st.id = any(array(select f.stream from fit f))
    order by st.id::text collate "C"  -- as by id, but no reason to read the index of ids from end to end
    for no key update of st
), moving as materialized (
    select f.stream, l.kind, l.delivered_seq, max(f.seq) + 1 as beyond,
        -- numbers that may be cut: beyond what was delivered or cut before, and of this term (numbers jump)
        greatest(l.delivered_seq, l.floor_seq, (max(f.seq) + 1) / {jump} * {jump} - 1) as cut_after,
        max(f.seq) + 1 - case when l.sink is null then $10::bigint else $12::bigint end as cut_before
    from fit f
    join locked l on l.id = f.stream and l.session = f.session and not l.closed
    left join lateral (
        -- "is true" and "any(array[...])", here and below, leave the planner one way to find a row: see store/scan_floors.py
        select r.id from {schema}.requests r
        where r.id = f.finishes and coalesce(r.claimed_epoch, f.epoch) = f.epoch and (r.finished_at is null) is true
        limit 1
    ) q on true
    group by f.stream, l.kind, l.delivered_seq, l.floor_seq, l.sink, l.next_seq
    having min(f.seq) = l.next_seq
       and max(f.seq) - min(f.seq) + 1 = count(*)
       and count(q.id) = count(f.finishes)
), done as (
    update {schema}.requests q
    set finished_at = clock_timestamp(), outcome = f.outcome, open = m.kind = 'request'
    from fit f join moving m on m.stream = f.stream
    where q.id = any(array[f.finishes]) and coalesce(q.claimed_epoch, f.epoch) = f.epoch and (q.finished_at is null) is true
    returning q.stream, q.session
), used as materialized (
    select s.id
    from held h join {schema}.sessions s on s.id = h.id
    where h.last_active_at < clock_timestamp() - make_interval(secs => $11)
      and exists (select from done where done.session = h.id)
    order by s.id
    for no key update of s skip locked
), noted as (
    update {schema}.sessions s set last_active_at = clock_timestamp() from used where s.id = used.id
), topics as materialized (
    select distinct f.stream, f.topic, m.delivered_seq
    from fit f join moving m on m.stream = f.stream
    where m.kind = 'standalone' and f.topic is not null
), replaced as (
    delete from {schema}.events e
    using topics t
    where e.stream = any(array[t.stream]) and e.topic = any(array[t.topic]) and e.seq > t.delivered_seq
), cut as (
    delete from {schema}.events e
    using moving m
    where m.kind = 'standalone' and e.stream = any(array[m.stream]) and e.seq > m.cut_after and e.seq < m.cut_before
      and (e.topic is null) is false  -- in this form no index by topic serves, which would lead through all that is kept
      and not exists (select from topics t where t.stream = e.stream and t.topic = e.topic)
    returning e.stream, e.seq
), moved as (
    update {schema}.streams st
    set next_seq = m.beyond,
        floor_seq = greatest(st.floor_seq, (select max(cut.seq) from cut where cut.stream = m.stream)),
        unfinished = greatest(st.unfinished - d.finished, 0),
        closed = m.kind = 'request' and st.unfinished = d.finished,
        closed_at = case when m.kind = 'request' and st.unfinished = d.finished then clock_timestamp() end
    from moving m
    cross join lateral (select count(*) as finished from done where done.stream = m.stream) d
    where st.id = any(array[m.stream])
    returning st.id, st.closed
), stored as (
    insert into {schema}.events (stream, seq, message, topic)
    -- messages are taken where they are stored, and go through no other step: each would copy them
    select o.stream, o.seq, ($5::bytea[])[o.n], o.topic
    from (
        select f.stream, f.seq, f.topic, f.n from fit f join moving m on m.stream = f.stream
        order by f.stream, f.seq
    ) o
)
select
    f.n is null as fenced,
    m.stream is not null
        or exists (select from {schema}.events e where e.stream = any(array[a.stream]) and e.seq = a.seq) as stored,
    l.sink, l.sink_epoch, coalesce(v.closed, false) as closed
from asked a
left join fit f on f.n = a.n
left join locked l on l.id = a.stream
left join moving m on m.stream = a.stream
left join moved v on v.id = a.stream
order by a.n;

-- name: read_streams
-- What each stream holds after the reader's cursor, while the reader is still its sink and nothing after its cursor was
-- pruned or cut that it does not know of ($7). Of an event of more than $6 bytes only so many: see read_on.
select a.n, st.closed, st.next_seq, e.seq, e.size,
    case when e.size > $6 then substring(e.message from 1 for $6::integer) else e.message end as message
from unnest($1::uuid[], $2::bigint[], $3::bigint[], $7::bigint[])
    with ordinality as a (stream, sink_epoch, after, floor, n)
cross join lateral (
    select t.closed, t.next_seq from {schema}.streams t
    where t.id = a.stream and t.sink = $4 and t.sink_epoch = a.sink_epoch
      and t.floor_seq <= greatest(a.after, a.floor)
    offset 0
) st
left join lateral (
    -- at most $5 events and, unless the first is larger, $6 bytes; the sizes are known without reading the messages
    select e.seq, e.message, e.size
    from (
        select p.seq, p.message, octet_length(p.message) as size,
            sum(octet_length(p.message)) over upto as bytes, row_number() over upto as place
        from (
            select q.seq, q.message from {schema}.events q
            where q.stream = a.stream and q.seq > a.after
            order by q.seq
            limit $5
        ) p
        window upto as (order by p.seq)
    ) e
    where e.bytes <= $6 or e.place = 1
) e on true
order by a.n, e.seq;

-- name: read_on
-- The bytes of one event from $5 on, of a sealed one from $7 on, $6 of them at most, while the reader is still its stream's
-- sink.
select v.sealed, octet_length(e.message) as size,
    substring(e.message from case when v.sealed then $7::integer else $5::integer end for $6::integer) as piece
from {schema}.streams st
join {schema}.events e on e.stream = st.id and e.seq = $4
cross join lateral (select substring(e.message from 1 for 1) = '\x00'::bytea as sealed) v
where st.id = $1 and st.sink_epoch = $2 and st.sink = $3;

-- name: sink_epoch
-- Of a stream ($2), or of a session's standalone one.
select st.sink_epoch from {schema}.streams st where st.id = $2::uuid
union all
select st.sink_epoch from {schema}.sessions s join {schema}.streams st on st.session = s.id and st.kind = 'standalone'
where s.session_id = $1::text and $2::uuid is null;

-- name: attach
-- Newest sink wins, unless listeners displace each other: a standalone stream whose sinks, on living nodes, were replaced
-- $9 times within $10 seconds stays where it is. $8 is the epoch of the sink that it takes the stream from, which was seen
-- just before: what arrives late must not take it from a newer one ("moved"). $5 null means the session's standalone
-- stream; $1 null, the HTTP+SSE session of the stream $5. Coming for a stream is use of its session, noted once in $11
-- seconds.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id, s.session_id, s.owner, s.epoch, s.protocol_version, s.last_active_at
    from guard, {schema}.sessions s
    where (s.session_id = $1 or ($1 is null and s.id = (select session from {schema}.streams where id = $5)))
      and s.transport = case when $1 is null then 'sse' else 'streamable' end
      and (s.principal_client, s.principal_issuer, s.principal_subject)
          is not distinct from ($2::text, $3::text, $4::text)
    for key share of s
), used as materialized (
    select s.id
    from held h join {schema}.sessions s on s.id = h.id
    where h.last_active_at < clock_timestamp() - make_interval(secs => $11)
    for no key update of s skip locked
), noted as (
    update {schema}.sessions s set last_active_at = clock_timestamp() from used where s.id = used.id
), target as materialized (
    select st.id, st.sink, st.kind, st.replaced_at, st.sink_epoch is distinct from $8::bigint as moved, (
        select count(*) from {schema}.streams o
        where o.session = held.id and o.sink is not null and o.id <> st.id  -- one that moves is not one more
    ) >= $7 as full
    from held join {schema}.streams st on st.session = held.id
    where st.id = coalesce($5::uuid, (
        select w.id from {schema}.streams w where w.session = held.id and w.kind = 'standalone'
    ))
    for no key update of st
), judged as materialized (
    -- after the lock: whoever waited for it sees the sink that came meanwhile
    select t.id, t.sink, t.full, t.moved, t.kind = 'standalone' and exists (
        select from {schema}.node_states n where n.node_id = t.sink and n.state in ('joining', 'ready', 'draining')
    ) as displaces, array(
        select at from unnest(t.replaced_at) at where at > clock_timestamp() - make_interval(secs => $10) order by at
    ) as lately
    from target t
), taken as (
    update {schema}.streams st
    set sink = $6, sink_epoch = st.sink_epoch + 1,
        replaced_at = case when j.displaces then j.lately || clock_timestamp() else st.replaced_at end
    from judged j
    where st.id = j.id and not j.full and not j.moved and not (j.displaces and cardinality(j.lately) >= $9)
    returning st.id, st.kind, st.sink_epoch, st.next_seq, st.delivered_seq, st.floor_seq, st.closed
)
select
    coalesce(judged.full, false) as full, coalesce(judged.moved, false) as moved,
    coalesce(judged.displaces, false) as displaces,
    held.id as session, held.session_id, held.owner, held.epoch, held.protocol_version,
    taken.id as stream, taken.kind, taken.sink_epoch, taken.next_seq, taken.delivered_seq, taken.floor_seq,
    taken.closed, judged.sink as replaced, (o.state in ('joining', 'ready', 'draining')) is not true as orphaned,
    o.name as owner_name
from held
left join taken on true
left join judged on true
left join {schema}.node_states o on o.node_id = held.owner;

-- name: release
-- An edge notes how far it carried streams and, unless it keeps them ($5), lets go of them; a stream written to its end
-- frees its requests' ids, all of them at once. What was carried was use of its session until now, noted once in $6
-- seconds: those sessions' rows are locked before the streams', so that no sweep finds a stream let go and its use not
-- noted.
with guard as materialized (
    select set_config('lock_timeout', '{lock_wait}', true), set_config('synchronous_commit', 'off', true)
), asked as materialized (
    select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $5::boolean[]) as a (stream, sink_epoch, delivered, keeps)
), used as materialized (
    select s.id
    from guard, {schema}.sessions s
    where s.id in (
        select st.session
        from asked a join {schema}.streams st on st.id = any(array[a.stream])
        where st.sink = $4 and st.sink_epoch = a.sink_epoch and not a.keeps
    )
      and s.last_active_at < clock_timestamp() - make_interval(secs => $6)
    order by s.id
    for no key update of s
), locked as materialized (
    select st.id, st.session, st.next_seq, st.closed, a.delivered, a.keeps
    from guard, (select count(*) from used) as before, {schema}.streams st
    join asked a on st.id = any(array[a.stream])
    where st.sink = $4 and st.sink_epoch = a.sink_epoch
    order by st.id::text collate "C"
    for no key update of st
), freed as (
    update {schema}.requests r set open = false
    from locked l
    where r.stream = any(array[l.id]) and r.open::integer = 1 and l.closed and l.delivered >= l.next_seq - 1
), noted as (
    update {schema}.sessions s set last_active_at = clock_timestamp()
    from used
    where s.id = used.id and s.id in (select l.session from locked l where not l.keeps)
)
update {schema}.streams st
set delivered_seq = greatest(st.delivered_seq, least(l.delivered, l.next_seq - 1)),  -- clients may name any event
    sink = case when l.keeps then st.sink end,
    released_at = case when l.keeps then st.released_at else clock_timestamp() end
from locked l
where st.id = any(array[l.id])
returning st.id;

-- name: carried_streams
select id, sink_epoch from {schema}.streams where sink = $1;

-- name: sink_of
select sink, sink_epoch from {schema}.streams st
where st.session = $1 and (($2::uuid is null and st.kind = 'standalone') or st.id = $2);

-- name: drop_sink
-- fence: owner and epoch. A server asked to close the client's connection: the sink loses the stream and lets go. Only the
-- sink that was seen ($5, its epoch): a late first try must not take the stream from a newer one.
-- It was use of the session until now, noted once in $6 seconds.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id, s.last_active_at from guard, {schema}.sessions s
    where s.id = $1 and s.owner = $2 and s.epoch = $3
    for key share of s
), target as materialized (
    select st.id, st.sink from held join {schema}.streams st on st.session = held.id
    where (($4::uuid is null and st.kind = 'standalone') or st.id = $4)
      and (st.sink_epoch = $5::bigint or st.sink_epoch = $5::bigint + 1 and st.sink is null)
    for no key update of st
), used as materialized (
    select s.id
    from held h join {schema}.sessions s on s.id = h.id
    where h.last_active_at < clock_timestamp() - make_interval(secs => $6)
      and exists (select from target where target.sink is not null)
    for no key update of s skip locked
), noted as (
    update {schema}.sessions s set last_active_at = clock_timestamp() from used where s.id = used.id
), dropped as (
    update {schema}.streams st set sink = null, sink_epoch = st.sink_epoch + 1, released_at = clock_timestamp()
    from target where st.id = target.id and st.sink_epoch = $5::bigint
)
select id as stream from target;

