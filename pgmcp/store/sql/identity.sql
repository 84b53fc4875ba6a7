-- name: cluster
select serves, made_by from {schema}.cluster;

-- name: hold_cluster
select from {schema}.cluster for update;

-- name: rename_cluster
-- The lock of hold_cluster is held. Nodes whose leases ran out are declared dead by the way, so that none comes back.
with buried as (
    update {schema}.nodes set state = 'dead', cause = 'lease'
    where state in ('joining', 'ready', 'draining') and expires_at < clock_timestamp()
), living as materialized (
    select n.name from {schema}.nodes n
    where n.state in ('joining', 'ready', 'draining') and n.expires_at >= clock_timestamp()
), changed as (
    update {schema}.cluster set serves = $1 where not exists (select from living)
)
select string_agg(name, ', ' order by name) from living;

-- name: note_maker
update {schema}.cluster set made_by = $1 where serves is null and made_by is null;

-- name: schema_exists
select from pg_namespace where nspname = $1;

-- name: drop_schema
drop schema if exists {schema} cascade;
