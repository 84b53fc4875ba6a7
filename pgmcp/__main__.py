"""``python -m pgmcp`` is the ``pgmcp`` command."""

from pgmcp.cli import main

if __name__ == "__main__":
    main(prog_name="pgmcp")
