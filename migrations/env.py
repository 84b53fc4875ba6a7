"""Runs the migrations inside pgmcp's own schema; started by ``pgmcp.store.schema.migrations`` only.

The config attributes carry what a run needs: ``schema`` (its name, already checked), ``metadata`` (the tables in
that schema), ``limits`` (settings of a script's connection) and, online, ``connection``. The version table lives in the
same schema, so that other applications and other Alembic users of the database are never seen and never touched.

A contract step takes away what nodes of older builds use: its module says in ``needs`` which revision a build has to
know from then on. Before such a step, and before each step back, its transaction looks for nodes that could not go on.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import sqlalchemy as sa
from alembic import context, op

FIRST = "0003"
"""The step that brings the ranges: before it nothing is known of nodes, and no step of those takes anything away."""

# The comment says who made the schema: `downgrade base` drops it only then, and only when it is empty.
OURS = "pgmcp: made by pgmcp db upgrade"
CREATE_SCHEMA = """
do $$ begin
  if not exists (select from pg_catalog.pg_namespace where nspname = '{schema}') then
    create schema "{schema}";
    comment on schema "{schema}" is '{ours}';
  end if;
end $$"""
DROP_SCHEMA = """
do $$ begin
  drop table if exists "{schema}".alembic_version;
  if exists (select from pg_catalog.pg_namespace
              where nspname = '{schema}' and obj_description(oid, 'pg_namespace') = '{ours}') then
    begin
      drop schema "{schema}" restrict;
    exception when dependent_objects_still_exist then
      raise notice 'schema {schema} holds objects that are not of pgmcp: it stays';
    end;
  end if;
end $$"""

# Stops a step to {after}, where builds have to know {needs}, if a living node would not fit. The row of schema_range is
# first: a node that joins now waits for this step, and is judged by what it leaves. A node of a build before 0003 fits
# the revision that it has written. Who was away for a minute is declared dead, and hears of it when it comes back.
GUARD = """
do $$ declare unfit text; begin
  update "{schema}".schema_range set needs = '{needs}';
  update "{schema}".nodes set state = 'dead', cause = 'schema'
   where {unfit} and expires_at < clock_timestamp() - interval '1 minute';
  select string_agg(name || ' (' || node_id || ')', ', ' order by name, node_id) into unfit
    from "{schema}".nodes where {unfit};
  if unfit is not null then
    raise exception using errcode = 'MCP01',
      message = 'The step to {after} waits for living nodes that could not go on after it: ' || unfit || '.';
  end if;
end $$"""
UNFIT = """state in ('joining', 'ready', 'draining')
   and (coalesce(schema_newest, schema_revision) < '{needs}' or coalesce(schema_oldest, schema_revision) > '{after}')"""

attributes = context.config.attributes
if "schema" not in attributes:
    message = "Migrations run through pgmcp, not through alembic. Run `pgmcp db --help`."
    raise RuntimeError(message)
SCHEMA: str = attributes["schema"]
DOWN: bool = attributes["down"]


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Look at nothing outside the own schema."""
    return kind != "schema" or name == SCHEMA


def configure(**where: Any) -> None:
    context.configure(
        target_metadata=attributes["metadata"],
        version_table="alembic_version",
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=include_name,
        compare_server_default=True,
        transaction_per_migration=True,
        **where,
    )


def own(statement: str) -> str:
    return statement.format(schema=SCHEMA, ours=OURS).strip()


def guard_steps() -> None:
    """Let each step that takes something away look for nodes first."""
    needs = "0001"
    for script in reversed(list(context.script.walk_revisions())):
        module: Any = script.module
        before, needs = needs, getattr(module, "needs", needs)
        if needs != before:
            module.upgrade = guarded(module.upgrade, script.revision, needs)
        if script.revision >= FIRST:
            module.downgrade = guarded(module.downgrade, module.down_revision, before)


def guarded(step: Callable[[], None], after: str, needs: str) -> Callable[[], None]:
    unfit = UNFIT.format(needs=needs, after=after)

    @wraps(step)
    def then_step() -> None:
        op.execute(GUARD.format(schema=SCHEMA, needs=needs, after=after, unfit=unfit).strip())
        step()

    return then_step


def run_online(connection: sa.Connection) -> None:
    if not DOWN:  # the version table needs its schema before the first migration
        connection.exec_driver_sql(own(CREATE_SCHEMA))
        connection.commit()
    configure(connection=connection)
    if not DOWN or sa.inspect(connection).has_table("alembic_version", schema=SCHEMA):
        connection.rollback()
        with context.begin_transaction():
            context.run_migrations()
    if DOWN and not context.get_context().get_current_heads():
        connection.exec_driver_sql(own(DROP_SCHEMA))
    connection.commit()


def run_offline() -> None:
    configure(dialect_name="postgresql", literal_binds=True)
    for limit in attributes["limits"]:
        context.execute(limit)
    if not DOWN:
        context.execute(own(CREATE_SCHEMA))
    with context.begin_transaction():
        context.run_migrations()
    if DOWN and attributes["revision"].endswith("base"):
        context.execute(own(DROP_SCHEMA))


guard_steps()
if context.is_offline_mode():
    run_offline()
else:
    run_online(attributes["connection"])
