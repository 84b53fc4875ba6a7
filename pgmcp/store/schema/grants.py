"""The SQL that gives roles what they need of a schema, and nothing else.

Three roles: the *owner* migrates and owns everything; the *runtime* role of the nodes reads and writes rows, owns
nothing and may change no table; a *reader* sees the public views.

Invariants:
- The script may be run at any time and as often as one likes, before the first migration, too.
- What later migrations make is the runtime role's by default privileges. Views are never dropped on the way up, only
  replaced (``tests/store/test_grants.py``), so a reader keeps them; only a new one needs the script again.
"""

from __future__ import annotations

from pgmcp.errors import SettingsError
from pgmcp.store.connection.one_shot import checked
from pgmcp.store.schema.public_views import COLUMNS

NAME_BYTES = 63

# Everybody may call these by default; who has revoked that has to grant it (``history.sql``, ``takeover.sql``).
FAILOVER = ("pg_control_system()", "pg_walfile_name(pg_lsn)", "pg_current_wal_lsn()", "pg_postmaster_start_time()")
"""What a node asks a new connection by: a failover that has lost commits is noticed by these only."""

_SCRIPT = """\
-- Rights on schema {schema}, as `pgmcp db grants` prints them. Run it as {runner}, as often as you like:
-- before the first `pgmcp db upgrade` or after it.
begin;

do $$ declare other text; begin
  if not exists (select from pg_catalog.pg_namespace where nspname = {schema_text}) then
    create schema {schema}{authorization};
  end if;
  select tableowner into other from pg_catalog.pg_tables
   where schemaname = {schema_text} and tablename = 'alembic_version' and tableowner <> {owner_text};
  if other is not null then
    raise exception 'Schema % is migrated by role %, not by %: what that makes later would not be granted.',
      {schema_text}, other, {owner_text}
      using hint = 'Print this with --owner ' || other || '.';
  end if;
end $$;

-- {runtime} runs nodes: rows, no tables. The default privileges are for what later migrations make.
grant usage on schema {schema} to {runtime};
grant select, insert, update, delete on all tables in schema {schema} to {runtime};
grant usage, select on all sequences in schema {schema} to {runtime};
grant execute on all functions in schema {schema} to {runtime};
alter default privileges{for_owner} in schema {schema}
  grant select, insert, update, delete on tables to {runtime};
alter default privileges{for_owner} in schema {schema}
  grant usage, select on sequences to {runtime};
alter default privileges{for_owner} in schema {schema}
  grant execute on functions to {runtime};
{reader_grants}
-- Usually everybody has these. The functions of pg_catalog tell a node of a failover that has lost commits.
do $$ declare needed text; begin
  for needed in
    select format('grant connect on database %I to %I', current_database(), role)
      from unnest(array[{roles_text}]) role
     where not has_database_privilege(role, current_database(), 'connect')
    union all
    select format('grant execute on function pg_catalog.%s to %I', asked, {runtime_text})
      from unnest(array[{functions_text}]) asked
     where not has_function_privilege({runtime_text}, 'pg_catalog.' || asked, 'execute')
  loop
    begin
      execute needed;
    exception when insufficient_privilege then
      raise warning 'a superuser has to run: %', needed;
    end;
  end loop;
end $$;

commit;

-- Not needed, and a superuser's to give: nodes then name whoever holds an old snapshot, whatever its role.
-- grant pg_read_all_stats to {runtime};
"""

_READER = """
-- {reader} sees the public views and no table: a new view of a later build is granted by running this again.
grant usage on schema {schema} to {reader};
do $$ declare shown text; begin
  foreach shown in array array[{views_text}] loop
    if exists (select from pg_catalog.pg_views where schemaname = {schema_text} and viewname = shown) then
      execute format('grant select on %I.%I to %I', {schema_text}, shown, {reader_text});
    else
      raise warning 'there is no view % yet: run this again after pgmcp db upgrade', shown;
    end if;
  end loop;
end $$;
"""


def script(schema: str, runtime: str, reader: str = "", owner: str = "") -> str:
    """The grants as a script for psql, in one transaction; connects to nothing.

    Args:
        schema: the schema of pgmcp's tables.
        runtime: the role that nodes connect as.
        reader: the role that only looks at the public views; empty for none.
        owner: the role that migrates; empty for whoever runs the script.

    Raises:
        SettingsError: the schema or a role cannot be called so, or one role is named twice.
    """
    named = [_checked(role) for role in (runtime, reader, owner) if role]
    if len(set(named)) < len(named):
        message = "Each role has a purpose of its own: give --runtime, --reader and --owner different ones."
        raise SettingsError(message)
    words = {
        "schema": f'"{checked(schema)}"',
        "schema_text": _text(schema),
        "runner": f"{_name(owner)} or a superuser" if owner else "the role that migrates",
        "owner_text": _text(owner) if owner else "current_user::text",
        "authorization": f" authorization {_name(owner)}" if owner else "",
        "for_owner": f" for role {_name(owner)}" if owner else "",
        "runtime": _name(runtime),
        "runtime_text": _text(runtime),
        "reader": _name(reader),
        "reader_text": _text(reader),
        "roles_text": ", ".join(_text(role) for role in (runtime, reader) if role),
        "functions_text": ", ".join(_text(function) for function in FAILOVER),
        "views_text": ", ".join(_text(view) for view in COLUMNS),
    }
    return _SCRIPT.format(reader_grants=_READER.format(**words) if reader else "", **words)


def _checked(role: str) -> str:
    # A dollar could end the script's blocks.
    if len(role.encode()) > NAME_BYTES or not role.isprintable() or "$" in role:
        message = f"Role {role!r} refused: up to {NAME_BYTES} bytes that can be printed, without a dollar sign."
        raise SettingsError(message)
    return role


def _name(role: str) -> str:
    return '"' + role.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
