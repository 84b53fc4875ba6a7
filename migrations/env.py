"""Runs the migrations inside pgmcp's own schema; started by ``pgmcp.store.migrations`` only.

The config attributes carry what a run needs: ``schema`` (its name, already checked), ``metadata`` (the tables in
that schema) and, online, ``connection``. The version table lives in the same schema, so that other applications
and other Alembic users of the database are never seen and never touched.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context

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
    if not DOWN:
        context.execute(own(CREATE_SCHEMA))
    with context.begin_transaction():
        context.run_migrations()
    if DOWN and attributes["revision"].endswith("base"):
        context.execute(own(DROP_SCHEMA))


if context.is_offline_mode():
    run_offline()
else:
    run_online(attributes["connection"])
