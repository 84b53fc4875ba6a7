"""The image's health check: is the node alive that is process 1? Where it listens is read off its command line.

Alive, not ready: a node must not be restarted because the database is away. Nothing of pgmcp is imported: that would
take longer than the check may.
"""

import http.client
import os
import sys
from pathlib import Path

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - where to ask, not to listen


def given(words: list[str], option: str) -> str:
    """The value of an option, as the command line or the option's variable has it; the last one counts."""
    value = os.environ.get("PGMCP_" + option.upper(), "")
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, rest = word.partition("=")
        if name == f"--{option}":
            value = rest if equals else following
    return value


def alive(words: list[str]) -> bool:
    """Whether /livez says so."""
    host = given(words, "host")
    connection = http.client.HTTPConnection(ANY.get(host, host), int(given(words, "port") or 8000), timeout=2)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    except OSError:
        return False


if __name__ == "__main__":
    command_line = Path(sys.argv[1] if len(sys.argv) > 1 else "/proc/1/cmdline")
    sys.exit(not alive(command_line.read_text().split("\0")))
