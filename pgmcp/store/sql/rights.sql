-- name: lacking_rights
-- What this role may not do of what nodes do ($1: tables of whose rows they do anything, $2: tables that they read), as
-- GRANT has it. Nothing where there is no such schema: whoever needs its tables says so. The catalogue is open to everybody.
with tables as materialized (
    select c.oid, c.relname::text as name, c.relname = any($1::text[]) as written
    from pg_catalog.pg_class c
    where c.relnamespace = to_regnamespace('{schema}') and c.relkind = 'r'
      and (c.relname = any($1::text[]) or c.relname = any($2::text[]))
), lacking as (
    select 0 as rank, 'usage on schema ' || n.nspname as what
    from pg_catalog.pg_namespace n
    where n.oid = to_regnamespace('{schema}') and not has_schema_privilege(n.oid, 'usage')
    union all
    select 1, string_agg(p.privilege, ', ' order by p.place) || ' on table ' || t.name
    from tables t
    join unnest(array['select', 'insert', 'update', 'delete']) with ordinality as p (privilege, place)
        on (t.written or p.privilege = 'select') and not has_table_privilege(t.oid, p.privilege)
    group by t.name
    union all
    select 2, 'execute on function ' || f.proname
    from pg_catalog.pg_proc f
    where f.pronamespace = to_regnamespace('{schema}') and f.proname = any($3::text[])
      and not has_function_privilege(f.oid, 'execute')
)
select current_user::text as role, array_agg(l.what order by l.rank, l.what) as what from lacking l having count(*) > 0;
