"""What both benchmarks need of the machine: a PostgreSQL on disk, child processes, their CPU time, tables."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pgmcp.embedded import EmbeddedPostgres, bound_to_parent
from pgmcp.store.schema import migrations

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "pgmcp"
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def postgres(**settings: str) -> Iterator[EmbeddedPostgres]:
    """An embedded PostgreSQL with the schema of this build: durable, on the disk of the temporary folder."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up, as Ctrl-C does
    folder = Path(tempfile.mkdtemp(prefix="pgmcp-bench-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(
        folder / "postgres", settings={"shared_buffers": "128MB", "max_wal_size": "2GB", **settings}
    )
    try:
        with server:
            migrations.upgrade(server.url, SCHEMA)
            yield server
    finally:
        shutil.rmtree(server.home, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def spawn(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Run a script of this folder (or ``-m module``) as a child that never outlives this process."""
    command = [script] if script.startswith("-") else [str(Path(__file__).parent / script)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=bound_to_parent(signal.SIGKILL),  # noqa: PLW1509 - nothing has threads when it starts a child
    )


def end(children: Sequence[subprocess.Popen[str]]) -> None:
    """Have children stop; kill those that do not."""
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 8.0
    for child in children:
        try:
            child.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()


def cpu(pid: int) -> float:
    """Seconds of CPU, user and system, that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def core_time(pid: int) -> tuple[float, float]:
    """Seconds for which a process's main thread had a core, and for which it waited for one."""
    fields = Path(f"/proc/{pid}/schedstat").read_text("ascii").split()
    return int(fields[0]) / 1e9, int(fields[1]) / 1e9


def family_cpu(parent: int) -> float:
    """Seconds of CPU that a process, its living children and those that it has waited for have used."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text("ascii", "replace").rpartition(")")[2].split()
        except OSError:
            continue
        own = stat.parent.name == str(parent)
        if own or fields[1] == str(parent):
            total += sum(int(field) for field in fields[11 : 15 if own else 13]) / TICKS
    return total


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which ``part`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def spread(values: Sequence[float], form: str) -> str:
    """Median and range over the rounds, as ``median (least-most)``."""
    if not values:
        return "-"
    if len(values) == 1:
        return format(values[0], form)
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for humans and Markdown alike."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    sys.stdout.flush()


def machine() -> str:
    """One line on where the figures come from."""
    load = os.getloadavg()[0]
    return f"Python {platform.python_version()}, {os.cpu_count()} CPUs, load {load:.1f} at the start, fsync on"
