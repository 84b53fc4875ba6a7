-- name: history
-- Which history the server follows: every promotion of a standby and every restore of a backup begins another timeline.
-- The name of the WAL file that is being written tells it at once (the control file only after the next checkpoint).
select h.id, h.term, h.mark, pg_is_in_recovery() as standby,
    case when not pg_is_in_recovery() then
        (select c.system_identifier from pg_control_system() c)::text || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8)
    end as present
from {schema}.history h;

-- name: begin_history
-- The first node notes which history it found.
update {schema}.history set mark = $2 where id = $1 and mark = '';

-- name: begin_term
-- fence: whoever finds another history than the row says ($1, compare-and-set) makes all numbers of the former one
-- impossible in the same statement: epochs, so that no ownership of it can write, and the numbers of events. $2 is the
-- row's next id, $3 the next term, $4 the history's mark. What waits unclaimed up to "position" may have been claimed.
with changed as materialized (
    update {schema}.history h
    set id = $2, term = $3, mark = $4, began_at = clock_timestamp(),
        position = (select coalesce(max(r.position), 0) from {schema}.requests r)
    from (select o.id, o.term from {schema}.history o where o.id = $1 for update) o
    where h.id = o.id
    returning (h.term - o.term) * 1000000 as jump
), held as materialized (
    select s.id, changed.jump from changed, {schema}.sessions s order by s.id for update of s
), epochs as (
    update {schema}.sessions s set epoch = s.epoch + held.jump from held where s.id = held.id
), numbers as (
    update {schema}.streams st set next_seq = st.next_seq + held.jump from held
    where st.session = held.id and not st.closed
)
select jump from changed;

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
    where (s.owner = $3) is true and s.epoch = a.epoch and s.state = 'live'
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
