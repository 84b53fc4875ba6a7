-- name: add_key
-- The ring's first key, or its next one when the newest is older than $4 seconds. Nodes that come to it at once choose
-- the same generation, and one of them gets it. A node that wraps nothing adds nothing to a ring that is wrapped.
insert into {schema}.secrets (purpose, key, wrapped_by, generation)
select $1, $2, $3::bytea, coalesce(max(generation), 0) + 1
from {schema}.secrets where purpose = $1
having coalesce(max(created_at), '-infinity') < clock_timestamp() - make_interval(secs => $4)
   and ($3::bytea is not null or count(wrapped_by) = 0)
on conflict (purpose, generation) do nothing;

-- name: key_ring
select id, key, wrapped_by, extract(epoch from clock_timestamp() - created_at)::float8 as age
from {schema}.secrets where purpose = $1 order by id;

-- name: wrap_keys
-- All of a ring or none: from then on a key that lies in clear is nobody's.
update {schema}.secrets s set key = anew.key, wrapped_by = $4
from unnest($1::int[], $2::bytea[], $3::bytea[]) as anew (id, before, key)
where s.id = anew.id and s.key = anew.before;

-- name: drop_keys
-- Those whose successor is older than $2 seconds.
delete from {schema}.secrets s
where s.purpose = $1 and exists (
    select from {schema}.secrets next
    where next.purpose = s.purpose and next.id > s.id
      and next.created_at < clock_timestamp() - make_interval(secs => $2)
);

-- name: spend_state
-- Whoever is first has it; $2 tells a repeated statement from another use.
with first as (
    insert into {schema}.spent_states (state, spender, expires_at)
    values ($1, $2, clock_timestamp() + make_interval(secs => $3))
    on conflict (state) do nothing
    returning spender
)
select spender = $2 as mine from first
union all
select spender = $2 from {schema}.spent_states where state = $1;

-- name: prune_states
delete from {schema}.spent_states
where state in (
    select state from {schema}.spent_states
    where expires_at < clock_timestamp()
    order by expires_at
    limit $1
    for update skip locked
)
returning 1;
