-- name: pin
-- What differs is set for the session. A setting that this version of PostgreSQL does not know is left out.
select count(pg_catalog.set_config(p.name, p.value, false))
from unnest($1::text[], $2::text[]) as p (name, value)
where pg_catalog.current_setting(p.name, true) <> p.value
  and (p.name <> 'synchronous_commit' or pg_catalog.current_setting(p.name) = 'off');

-- name: unpinned
-- What differs in the session behind this transaction, and limits that are shorter.
select s.name, s.reset_val as setting
from unnest($1::text[], $2::text[]) as p (name, value)
join pg_catalog.pg_settings s on s.name = p.name
where case when p.name = 'synchronous_commit' then s.reset_val = 'off'
           when s.unit = 'ms' then s.reset_val::bigint between 1 and p.value::bigint - 1
           else s.reset_val <> p.value end;
