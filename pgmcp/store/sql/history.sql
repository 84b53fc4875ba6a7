-- name: history
-- Which history the server follows: every promotion of a standby and every restore of a backup begins another timeline.
-- The name of the WAL file that is being written tells it at once (the control file only after the next checkpoint).
-- $1 is the node that asks: a row of its own that is older than its last good renewal tells that commits were lost. Where
-- its row is missing, only a server that started after that renewal can have lost it: else somebody has removed it.
select h.id, h.term, h.mark, coalesce(
        (select extract(epoch from n.renewed_at)::float8 from {schema}.nodes n where n.node_id = $1),
        case when pg_postmaster_start_time() < to_timestamp($2) then 'infinity'::float8 else '-infinity' end
    ) as renewed_at, h.next_id, h.next_term, h.next_mark, pg_is_in_recovery() as standby,
    case when not pg_is_in_recovery() then
        (select c.system_identifier from pg_control_system() c)::text || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8)
    end as present
from {schema}.history h;

-- name: begin_history
-- The first node notes which history it found.
update {schema}.history set mark = $2 where id = $1 and mark = '';

-- name: announce_term
-- Whoever finds another history than the row says ($1, compare-and-set) notes that its term begins: the row's next id,
-- the term's number, the history's mark. Until it has begun no connection to this history is used. What waits unclaimed up
-- to "position" may have been claimed.
update {schema}.history
set next_id = $2, next_mark = $4, next_session = 0,
    -- beyond every epoch: where an older build begins a term beside this one, sessions jump twice
    next_term = greatest($3::bigint, (select coalesce(max(s.epoch), 0) / {jump} + 1 from {schema}.sessions s)),
    next_position = (select coalesce(max(r.position), 0) from {schema}.requests r)
where id = $1 and (next_mark is distinct from $4 or next_term <= term)
returning next_term;

-- name: move_to_term
-- fence: sessions' rows FOR UPDATE, in id order. One piece ($2 sessions) of the work that makes all numbers of the former
-- history impossible: epochs, so that no ownership of it can write, and the numbers of events. Each session moves once,
-- with its streams: its epoch tells its term. Where the last piece ended is in the row, so anybody goes on after a crash.
with going as materialized (
    select h.next_term, h.next_session from {schema}.history h
    where h.next_id = $1 and h.next_term > h.term
    for update
), looked as materialized (
    select o.id from going g cross join lateral (
        select s.id from {schema}.sessions s where s.id > g.next_session order by s.id limit $2
    ) o
), held as materialized (
    select s.id, (g.next_term - s.epoch / {jump}) * {jump} as jump
    from going g, {schema}.sessions s
    where s.id in (select l.id from looked l) and s.epoch < g.next_term * {jump}
    order by s.id
    for update of s
), epochs as (
    update {schema}.sessions s set epoch = s.epoch + held.jump from held where s.id = held.id
), numbers as (
    update {schema}.streams st set next_seq = st.next_seq + held.jump from held
    where st.session = held.id and not st.closed
), moved as (
    update {schema}.history h set next_session = l.last
    from (select max(id) as last from looked) l
    where h.next_id = $1 and l.last is not null
)
select count(*) as looked from looked;

-- name: begin_term
-- All sessions have moved: the term begins, unless it has ($1 and $2, compare-and-set).
update {schema}.history
set id = next_id, term = next_term, mark = next_mark, position = next_position, began_at = clock_timestamp(),
    next_id = null, next_term = null, next_mark = null, next_session = null, next_position = null
where id = $1 and next_id = $2
returning term;

-- name: stands
-- The numbers of streams' next events.
select id, next_seq, closed from {schema}.streams where id = any($1::uuid[]);

-- name: knows_stream
select from {schema}.streams where id = $1;

-- name: unfinished
-- What of sessions is not finished.
select r.session, r.id from {schema}.requests r
where r.session = any($1::bigint[]) and r.rpc_id is not null and r.finished_at is null;

-- name: keep_claims
-- fence: owner and epoch on the sessions row, FOR KEY SHARE. In a term that just began the owner says which requests it
-- works on ($4); it began no other one, so the rest waits again. What was claimed in the term already is let be: this may
-- be a late first try.
with guard as materialized (
    select set_config('lock_timeout', '250ms', true)
), held as materialized (
    select s.id, s.epoch
    from guard, {schema}.sessions s
    join unnest($1::bigint[], $2::bigint[]) as a (session, epoch) on a.session = s.id
    where (s.owner = $3) is true and s.epoch = a.epoch
    order by s.id
    for key share of s
)
update {schema}.requests r
set claimed_epoch = case when r.id = any($4::uuid[]) then held.epoch end,
    claimed_at = case when r.id = any($4::uuid[]) then clock_timestamp() end,
    claim = null,
    runs = case when r.id = any($4::uuid[]) then greatest(r.runs, 1)
        when r.claimed_epoch is not null then greatest(r.runs - 1, 0) else r.runs end
from held
where r.session = held.id and r.rpc_id is not null and r.finished_at is null
  and coalesce(r.claimed_epoch, 0) < held.epoch;
