"""The reference table of all settings, made from the settings themselves: ``python -m pgmcp.cli.reference``."""

from __future__ import annotations

from pgmcp.cli.options import flag, variable
from pgmcp.settings import Settings

HEAD = """# Settings

Made by `make reference` from `pgmcp/settings.py`. Each is an option of `pgmcp serve`, a variable, and a keyword of
`pgmcp.Cluster` (by the variable's name in lower case without `PGMCP_`; the schema is `schema_name`).

| Option | Variable | Default | What it is |
|---|---|---|---|
"""


def reference() -> str:
    """The whole page."""
    rows = []
    for name, field in Settings.model_fields.items():
        value = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        default = "" if value == "" else f"`{value}`"
        text = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{flag(name)}` | `{variable(name)}` | {default} | {text} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(reference(), end="")
