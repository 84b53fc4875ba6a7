-- name: open_session
-- The first owner creates a session with its standalone stream; a repeat finds its own row. $8 and $9 bound the sessions
-- in all (null: that is far away) and those of one caller: of a name, or else of an address ($11). Each term has epochs of its own: after a loss of
-- commits the key of a session may come up once more. $10 numbers the tries: each spends those before it, which may
-- still be on their way and must not bring a session back that its client has ended meanwhile.
with counted as materialized (
    select case when $8::bigint is not null then (select count(*) from {schema}.sessions) end as everybody,
        case
            when $4::text is not null then (
                select count(*) from {schema}.sessions s
                where s.principal_client = $4
                  and left(coalesce(s.principal_subject, s.principal_client), 100) = left(coalesce($6, $4), 100)
                  and (s.principal_issuer, s.principal_subject) is not distinct from ($5::text, $6::text)
            )
            when $11::text is not null then (select count(*) from {schema}.sessions s where s.address = $11)
            else 0
        end as own
), made as (
    insert into {schema}.sessions
        (session_id, owner, transport, principal_client, principal_issuer, principal_subject, address, epoch)
    select $1, $2, $3, $4, $5, $6, $11, coalesce((select {jump} * h.term from {schema}.history h), 0) + 1
    from counted where coalesce(everybody < $8, true) and own < $9
      and not exists (
          select from {schema}.spent_states where state = sha256(convert_to($1::text || '/' || $10::integer, 'UTF8'))
      )
    on conflict (session_id) do nothing
    returning id, epoch
), spent as (
    insert into {schema}.spent_states (state, spender, expires_at)
    select sha256(convert_to($1::text || '/' || n, 'UTF8')), gen_random_uuid(), clock_timestamp() + interval '1 hour'
    from generate_series(1, $10::integer - 1) n
    on conflict (state) do nothing
), standalone as (
    insert into {schema}.streams (id, session, kind)
    select $7::uuid, id, 'standalone' from made
), found as (
    select id, epoch from made
    union all
    select id, epoch from {schema}.sessions where session_id = $1 and owner = $2
)
select found.id, found.epoch, counted.everybody, counted.own from counted left join found on true;

-- name: make_room_of_caller
-- fence: DELETE locks the row FOR UPDATE; only then in_use() looks, with a snapshot of its own. While a caller ($1, $2, $3,
-- or those without a name at the address $5) has $4 sessions, the one that was used longest ago ends, if nothing of it runs
-- or is carried. Use is noted once a minute or so: of the hundred that were noted first, the last request decides. A repeat
-- finds that there is room.
with own as materialized (
    select s.id, s.last_active_at
    from {schema}.sessions s
    where s.principal_client = $1
      and left(coalesce(s.principal_subject, s.principal_client), 100) = left(coalesce($3, $1), 100)
      and (s.principal_issuer, s.principal_subject) is not distinct from ($2::text, $3::text)
    union all
    select s.id, s.last_active_at
    from {schema}.sessions s
    where $1::text is null and s.address = $5::text
), crowd as materialized (
    select count(*) as own from own
), unused as materialized (
    select s.id, s.last_active_at
    from crowd, own s
    where crowd.own >= $4::bigint
      and not exists (select from {schema}.requests r where r.session + 0 = s.id and r.finished_at is null)
      and not exists (select from {schema}.streams st where st.session = s.id and st.sink is not null)
    order by s.last_active_at
    limit 100
), chosen as materialized (
    select s.id
    from unused u join {schema}.sessions s on s.id = u.id and s.last_active_at = u.last_active_at
    order by greatest(u.last_active_at, (
        select greatest(r.accepted_at, r.finished_at) from {schema}.requests r
        where r.session = u.id order by r.position desc limit 1
    )), s.id
    limit 1
    for update of s skip locked
), ended as (
    delete from {schema}.sessions s using chosen where s.id = chosen.id and not {schema}.in_use(chosen.id) returning s.id
)
select crowd.own < $4::bigint as room, exists (select from unused) as some, (select id from ended) as ended from crowd;

-- name: make_room
-- fence: as make_room_of_caller. While there are $1 sessions in all, one whose client has not ended its handshake, nor was
-- heard of for $2 seconds, ends.
with crowd as materialized (
    select count(*) as everybody from {schema}.sessions
), unused as materialized (
    select s.id
    from crowd, {schema}.sessions s
    where crowd.everybody >= $1::bigint
      and s.last_active_at < clock_timestamp() - make_interval(secs => $2)
      and not exists (select from {schema}.journal j where j.session = s.id and j.kind = 'initialized')
      and not exists (select from {schema}.requests r where r.session + 0 = s.id and r.finished_at is null)
      and not exists (select from {schema}.streams st where st.session = s.id and st.sink is not null)
    order by s.last_active_at, s.id
    limit 1
), chosen as materialized (
    select s.id
    from unused u join {schema}.sessions s on s.id = u.id
    where s.last_active_at < clock_timestamp() - make_interval(secs => $2)
    for update of s skip locked
), ended as (
    delete from {schema}.sessions s using chosen where s.id = chosen.id and not {schema}.in_use(chosen.id) returning s.id
)
select crowd.everybody < $1::bigint as room, exists (select from unused) as some, (select id from ended) as ended from crowd;

-- name: find_session
select id, owner, epoch, protocol_version, false as orphaned
from {schema}.sessions
where session_id = $1
  and transport = $5
  and (principal_client, principal_issuer, principal_subject) is not distinct from ($2::text, $3::text, $4::text);

-- name: accept
-- fence: sessions rows FOR KEY SHARE, so that accepting is ordered with takeover, hand-over and DELETE, and the
-- owner that comes back is the one that holds after it. A request without a stream is answered on the standalone one.
-- A POST's messages ($15 numbers the POSTs) are stored all or none: whoever loses a race for an id fails and comes again.
-- $13 and $14 bound what a session may have unfinished: requests, and messages of any kind. They are counted above the
-- edge's floor for each session ($17 to $20, see store/scan_floors.py), and what it had counted is looked up by its id.
-- A sealed message is compared by its mark ($22), and with one that is not sealed by its digest ($23, only if it is sealed).
with guard as materialized (
    select set_config('lock_timeout', '{lock_wait}', true)
), asked as materialized (
    select *
    from unnest(
        $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
        $9::bytea[], $10::bytea[], $11::uuid[], $15::bigint[], $16::text[], $21::float8[], $22::bytea[], $23::bytea[]
    ) with ordinality
        as a (id, session_id, client, issuer, subject, rpc_id, method, name, body, context, stream, post, transport,
            arrived, mark, digest, n)
), held as materialized (
    select s.*
    from guard, {schema}.sessions s
    where s.session_id in (select session_id from asked)
    order by s.id
    for key share of s
), counted as materialized (
    select h.*, u.requests, u.messages, u.unfinished, pg_current_snapshot()::text as horizon,
        -- answers that wait on an HTTP+SSE stream that nobody carries, as far as they matter
        (
            select count(*) from {schema}.streams st cross join lateral (
                select from {schema}.events e where e.stream = st.id and e.seq > st.delivered_seq limit $14::bigint
            ) e
            where h.transport = 'sse' and st.session = h.id and st.kind = 'standalone' and st.sink is null
        ) as unread
    from held h
    join unnest($17::text[], $18::bigint[], $19::text[], $20::text[]) as f (session_id, low, running, known)
        on f.session_id = h.session_id
    cross join lateral (
        select count(*) as messages, count(o.rpc_id) as requests, array_agg(o.id) as unfinished
        from (
            select r.id, r.rpc_id from {schema}.requests r
            where r.session + 0 = h.id and r.xact + 0 >= f.low and r.finished_at is null
            union
            select r.id, r.rpc_id from unnest(f.running::bigint[]) as x (xact)
            cross join lateral (
                select q.id, q.rpc_id from {schema}.requests q
                where q.session + 0 = h.id and q.xact + 0 = x.xact and q.finished_at is null
                offset 0
            ) r
            union
            select r.id, r.rpc_id from unnest(f.known::uuid[]) as k (id)
            cross join lateral (
                select q.id, q.rpc_id, q.finished_at from {schema}.requests q where q.id = k.id limit 1
            ) r
            where r.finished_at is null
        ) o
    ) u
), mine as materialized (
    select a.*, h.id as session, h.owner, h.epoch, h.protocol_version, h.unfinished, h.horizon,
        -- with this POST and those before it in this statement
        a.rpc_id is not null and h.requests + count(a.rpc_id) over posts > $13::bigint
            or h.messages + count(*) over posts > $14::bigint
            or a.rpc_id is not null and a.stream is null and h.unread >= $14::bigint as excess
    from asked a
    join counted h
        on h.session_id = a.session_id
        and h.transport = a.transport
        and (h.principal_client, h.principal_issuer, h.principal_subject)
            is not distinct from (a.client, a.issuer, a.subject)
    window posts as (partition by h.id order by a.post)
), known as materialized (
    select m.n, m.post, r.id, r.stream, r.same, r.sealed, m.digest is not null as seals,
        r.finished_at is not null as finished, st.sink is not null as attached
    from mine m
    cross join lateral (  -- one by one: a join of another kind would read all that is over
        (
            select q.id, q.stream, q.mark is not null as sealed, q.finished_at, case
                    when q.mark is not null then q.mark is not distinct from m.mark
                    when m.digest is not null then sha256(q.body) = m.digest
                    else q.body = m.body
                end as same
            from {schema}.requests q
            where q.session = m.session and q.rpc_id = m.rpc_id and q.open
            limit 1
        )
        union all
        -- whoever gives an id to another request has the answer of the last one: what came before that was stored ($21)
        -- is the same request, held up on its way here
        select q.id, q.stream, q.mark is not null, q.finished_at, true
        from (
            select l.* from {schema}.requests l
            where l.session + 0 = m.session and l.rpc_id || '' = m.rpc_id and l.rpc_id is not null
            order by l.position desc
            limit 1
        ) q
        where not q.open and q.finished_at > to_timestamp(m.arrived) and case
                when q.mark is not null then q.mark is not distinct from m.mark
                when m.digest is not null then sha256(q.body) = m.digest
                else q.body = m.body
            end
        limit 1
    ) r
    left join lateral (select t.sink from {schema}.streams t where t.id = r.stream offset 0) st on true
), repeated as materialized (
    -- POSTs that are there already, message for message
    select k.post
    from (select distinct post, stream, sealed, seals from known) k
    where not exists (select from known o where o.post = k.post and o.stream is distinct from k.stream)
      and (
          select array_agg(o.form order by o.form) from (
              select case when r.mark is not null then r.mark when k.seals then sha256(r.body) else r.body end as form
              from {schema}.requests r where r.stream = any(array[k.stream])
          ) o
      ) = (
          select array_agg(o.form order by o.form) from (
              select case when k.sealed then m.mark when k.seals then m.digest else m.body end as form
              from mine m where m.post = k.post
          ) o
      )
), fresh as materialized (
    select m.*
    from mine m
    where not exists (select from known k where k.post = m.post)
      and not exists (select from {schema}.requests r where r.id = any(array[m.id]))
      and not exists (
          select from mine o where o.post = m.post and o.excess
      )
), stored as (
    insert into {schema}.requests (id, session, rpc_id, method, name, body, context, stream, open, mark)
    select id, session, rpc_id, method, name, body, context, stream, rpc_id is not null,
        case when digest is not null then mark end
    from fresh
    order by session, rpc_id nulls first, n
    returning id
), opened as (
    insert into {schema}.streams (id, session, kind, sink, unfinished)
    select f.stream, f.session, 'request', $12::uuid, count(*)
    from fresh f join stored on stored.id = f.id
    where f.stream is not null and f.rpc_id is not null
    group by f.stream, f.session
    order by f.stream
    on conflict (id) do nothing
)
select
    m.session, m.owner, m.epoch, m.protocol_version, m.unfinished, m.horizon, (o.state in ('joining', 'ready', 'draining')) is not true as orphaned,
    o.name as owner_name,
    stored.id is not null or k.id = a.id
        or exists (select from {schema}.requests r where r.id = any(array[a.id])) as accepted,
    m.excess as full,
    k.id as known_id, k.stream as known_stream, k.same, k.finished, k.attached, k.sealed,
    -- on the one stream of HTTP+SSE each message stands for itself
    k.same and (k.stream is null or exists (select from repeated t where t.post = a.post)) as whole
from asked a
left join mine m on m.n = a.n
left join {schema}.node_states o on o.node_id = m.owner
left join stored on stored.id = a.id
left join known k on k.n = a.n
order by a.n;

-- name: claim
-- fence: owner and epoch on the sessions row, FOR KEY SHARE. A claim may commit asynchronously: what a crash of
-- PostgreSQL forgets was accepted and counts as may-have-run. $3 are the claims' own ids: a repeat ($5; it reads every
-- request of the session) finds its rows. $6: requests too, or only what serves those that run already. $7 and $8: above
-- the owner's floor for the session (see store/scan_floors.py). "is true" keeps the planner from reading every session of the
-- owner. What is taken is use of the session, noted once in $9 seconds.
with guard as materialized (
    select set_config('lock_timeout', '{lock_wait}', true), set_config('synchronous_commit', 'off', true)
), held as materialized (
    select s.id, s.epoch, s.last_active_at, a.claim, a.requests, a.low, a.running
    from guard, {schema}.sessions s
    join unnest($1::bigint[], $2::bigint[], $3::uuid[], $6::boolean[], $7::bigint[], $8::text[])
        as a (session, epoch, claim, requests, low, running)
        on a.session = s.id
    where (s.owner = $4) is true and s.epoch = a.epoch
    order by s.id
    for key share of s
), waiting as materialized (
    select r.id, h.claim, h.epoch
    from held h cross join lateral (
        select q.id, q.rpc_id, q.claimed_epoch from {schema}.requests q
        where q.session + 0 = h.id and q.xact + 0 >= h.low and q.finished_at is null
        union all
        select o.id, o.rpc_id, o.claimed_epoch from unnest(h.running::bigint[]) as x (xact)
        cross join lateral (
            select q.id, q.rpc_id, q.claimed_epoch from {schema}.requests q
            where q.session + 0 = h.id and q.xact + 0 = x.xact and q.finished_at is null
            offset 0
        ) o
    ) r
    where r.claimed_epoch is null and (h.requests or r.rpc_id is null)
), taken as (
    -- "is true" and "any(array[...])", here and elsewhere, leave the planner one way to find a row: see store/scan_floors.py
    update {schema}.requests r
    set claim = w.claim, claimed_epoch = w.epoch, claimed_at = clock_timestamp(), runs = r.runs + 1,
        finished_at = case when r.rpc_id is null then clock_timestamp() end,
        outcome = case when r.rpc_id is null then 'delivered' end
    from waiting w
    where r.id = any(array[w.id]) and r.claimed_epoch is null and (r.finished_at is null) is true
    returning r.id, r.position, r.session, r.rpc_id, r.method, r.body, r.context, r.stream
), used as materialized (
    select s.id
    from held h join {schema}.sessions s on s.id = h.id
    where h.last_active_at < clock_timestamp() - make_interval(secs => $9)
      and exists (select from taken where taken.session = h.id)
    order by s.id
    for no key update of s skip locked
), noted as (
    update {schema}.sessions s set last_active_at = clock_timestamp() from used where s.id = used.id
), mine as (
    select * from taken
    union
    select r.id, r.position, r.session, r.rpc_id, r.method, r.body, r.context, r.stream
    from held h join {schema}.requests r on r.session = h.id and r.claim = h.claim
    -- finished meanwhile: by an owner that works on it under a claim that a crash forgot
    where $5 and (r.rpc_id is null or r.finished_at is null)
)
select h.id as session, h.epoch, m.id, m.rpc_id, m.method, m.body, m.context, m.stream, st.next_seq,
    pg_current_snapshot()::text as horizon
from held h
left join mine m on m.session = h.id
left join lateral (select t.next_seq from {schema}.streams t where t.id = m.stream offset 0) st on true
order by h.id, m.position;

-- name: unclaimed
-- What is unfinished in the sessions of this owner, above its floor ($2, $3), and of what it had seen ($4); of sessions
-- that came to it within the last minute, all. Whether it waits for a claim: the answer to a lost wake-up, or to a lost
-- reply to a takeover. One row at least, with the look's horizon.
with seen as materialized (
    select r.id, r.session, r.claimed_epoch from {schema}.requests r where r.outcome is null and r.xact >= $2
    union
    select r.id, r.session, r.claimed_epoch from unnest($3::bigint[]) as x (xact)
    cross join lateral (
        select q.id, q.session, q.claimed_epoch from {schema}.requests q
        where q.outcome is null and q.xact = x.xact
        offset 0
    ) r
    union
    select r.id, r.session, r.claimed_epoch
    from unnest($4::uuid[]) as k (id)
    cross join lateral (
        select q.id, q.session, q.claimed_epoch, q.outcome from {schema}.requests q where q.id = k.id limit 1
    ) r
    where r.outcome is null
    union
    select r.id, r.session, r.claimed_epoch
    from (select t.* from {schema}.takeovers t order by t.id desc limit 1000) t
    cross join lateral (
        select q.id, q.session, q.claimed_epoch from {schema}.requests q
        where q.session + 0 = t.session and q.finished_at is null
    ) r
    where t.to_node = $1 and t.at > clock_timestamp() - interval '1 minute'
), own as materialized (
    select n.id, s.id as session, s.epoch, n.claimed_epoch is null or n.claimed_epoch < s.epoch as waits
    from seen n cross join lateral (
        select o.id, o.epoch, o.owner from {schema}.sessions o where o.id = n.session limit 1
    ) s
    where s.owner = $1
)
select pg_current_snapshot()::text as horizon, own.id, own.session, own.epoch, own.waits
from (values (1)) as one (row) left join own on true;

-- name: claimed_requests
select r.session, s.epoch, r.id, r.claim
from unnest($3::uuid[]) as k (id)
cross join lateral (select q.* from {schema}.requests q where q.id = k.id limit 1) r
cross join lateral (select o.* from {schema}.sessions o where o.id = r.session limit 1) s
where s.owner = $1 and r.claimed_epoch = s.epoch and r.finished_at is null
  and r.claimed_at < clock_timestamp() - make_interval(secs => $2);

-- name: put_back
-- fence: owner and epoch on the sessions row, FOR KEY SHARE. A run that was counted and never begun does not count. Only
-- the claims that were seen ($5): a late first try must not give up a newer one.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id, s.epoch from guard, {schema}.sessions s
    where s.id = $1 and s.owner = $2 and s.epoch = $3
    for key share of s
), back as (
    update {schema}.requests r
    set claimed_epoch = null, claim = null, claimed_at = null, runs = greatest(r.runs - 1, 0)
    from held, unnest($4::uuid[], $5::uuid[]) as a (id, claim)
    where r.id = a.id and r.claim is not distinct from a.claim
      and r.session = held.id and r.claimed_epoch = held.epoch and r.finished_at is null
)
select id from held;

-- name: free_request_id
-- The answer was not fetched and its id is wanted for another request.
update {schema}.requests set open = false where id = $1 and finished_at is not null;

-- name: establish
-- fence: owner and epoch on the sessions row, FOR KEY SHARE. $8 is the write's version: see write_journal.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id from guard, {schema}.sessions s
    where s.id = $1 and s.owner = $2 and s.epoch = $3
    for key share of s
), counted as (
    insert into {schema}.journal as j (session, kind, detail, body)
    select held.id, 'version', '', int8send($8::bigint) from held
    on conflict (session, kind, detail) do update set body = excluded.body where j.body <= excluded.body
    returning j.session
), established as (
    update {schema}.sessions s
    set protocol_version = $4, client_name = $5, client_version = $6, client_capabilities = $7
    from counted where s.id = counted.session
)
select held.id, exists (select from counted) as newest from held;

-- name: write_journal
-- fence: owner and epoch on the sessions row, FOR KEY SHARE. $7 is the write's version: the owner numbers the writes of a
-- session and makes one after the other, and a first try that arrives after a newer write changes nothing. The newest
-- version lies in an entry of its own, which outlives what is forgotten (big-endian: its bytes compare as numbers do).
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id from guard, {schema}.sessions s
    where s.id = $1 and s.owner = $2 and s.epoch = $3
    for key share of s
), counted as (
    insert into {schema}.journal as j (session, kind, detail, body)
    select held.id, 'version', '', int8send($7::bigint) from held
    on conflict (session, kind, detail) do update set body = excluded.body where j.body <= excluded.body
    returning j.session
), forgotten as (
    delete from {schema}.journal j using counted
    where j.session = counted.session and j.kind = $4 and j.detail = $5 and $6::bytea is null
), written as (
    insert into {schema}.journal as j (session, kind, detail, body)
    select counted.session, $4, $5, $6 from counted where $6::bytea is not null
    on conflict (session, kind, detail) do update set body = excluded.body, written_at = clock_timestamp()
)
select held.id, exists (select from counted) as newest from held;

-- name: still_owned
-- Which of these ownerships hold.
select s.id, s.epoch from {schema}.sessions s
join unnest($2::bigint[], $3::bigint[]) as a (session, epoch) on a.session = s.id
where (s.owner = $1) is true and s.epoch = a.epoch;

-- name: owned
select id, epoch from {schema}.sessions where owner = $1;

-- name: owners
-- Who owns sessions; what is heard of them may be made up.
select id, owner, epoch from {schema}.sessions where id = any($1::bigint[]);

-- name: end_session
-- fence: DELETE locks the row FOR UPDATE; the cascade then reads what is in flight with a snapshot of its own.
delete from {schema}.sessions where id = $1;

-- name: end_owned_session
-- fence: owner and epoch. A session that is not there any more has ended, perhaps by the first try of this statement.
with held as materialized (
    select id, owner = $2 and epoch = $3 as own from {schema}.sessions where id = $1 for update
), ended as (
    delete from {schema}.sessions s using held where s.id = held.id and held.own
)
select coalesce((select not own from held), false) as elsewhere;
