"""The reference table of all settings, made from the settings themselves: ``python -m pgmcp.cli.reference``."""

from __future__ import annotations

from pgmcp.cli.options import DURATIONS, GROUPS, WORKERS, WORKERS_TEXT, default_of, flag, range_of
from pgmcp.settings import Settings, variable

HEAD = f"""# Settings

Made by `make reference` from `pgmcp/settings.py`. Each is an option of `pgmcp serve`, a variable, and a keyword of
`pgmcp.Cluster` (by the variable's name in lower case without `PGMCP_`; the schema is `schema_name`).
{DURATIONS}
A variable that begins with `PGMCP_` and is not here is named in a node's log when it starts.
"""
TABLE = """
## {title}

| Option | Variable | Default | Range | What it is |
|---|---|---|---|---|
"""


def reference() -> str:
    """The whole page."""
    page = [HEAD]
    for title, names in GROUPS.items():
        page += [TABLE.format(title=title), *map(_row, names)]
        if "port" in names:
            least, most = WORKERS
            text = f"{WORKERS_TEXT} Of `pgmcp serve` only."
            page.append(f"| `--workers` | `PGMCP_WORKERS` | `1` | {least} to {most} | {text} |\n")
    return "".join(page)


def _row(name: str) -> str:
    field = Settings.model_fields[name]
    default = f"`{default}`" if (default := default_of(field)) else ""
    text = (field.description or "").replace("|", "\\|")
    return f"| `{flag(name)}` | `{variable(name)}` | {default} | {range_of(field)} | {text} |\n"


if __name__ == "__main__":
    print(reference(), end="")
