"""What ``pgmcp demo`` tells: lines with times, and the verdict. Coloured in a terminal, plain elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pgmcp.clock import Clock

PLAIN_WIDTH = 200


class Lost(Exception):
    """The client lost something, or was told something wrong; the message says what."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One scene's outcome.

    Args:
        what: what was done.
        seen: what the client saw of it.
        seconds: how long the client waited, None where it did not wait.
        promised: after how many seconds at most the session goes on; None for no promise.
    """

    what: str
    seen: str
    seconds: float | None = None
    promised: float | None = None

    @property
    def late(self) -> bool:
        """Whether the client waited longer than promised: a busy machine does that, and nothing is lost by it."""
        return self.seconds is not None and self.promised is not None and self.seconds > self.promised


def printer() -> Console:
    """Standard output."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


@dataclass
class Story:
    """Tells one run."""

    clock: Clock = field(default_factory=Clock)
    console: Console = field(default_factory=printer)
    findings: list[Finding] = field(default_factory=list)
    lost: str | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        self._began = self.clock.boottime()

    def scene(self, title: str) -> None:
        """Begin a part."""
        self.console.print(f"\n[bold cyan]{escape(title)}[/]")

    def say(self, line: str, style: str = "") -> None:
        """Tell what happened just now."""
        text = Text(f"{self.clock.boottime() - self._began:7.2f} s  ", style="dim")
        self.console.print(text.append(line, style=f"not dim {style}"), soft_wrap=True)

    def find(self, finding: Finding) -> None:
        """Note a scene's outcome."""
        self.findings.append(finding)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows."""
        table = Table(*columns, box=box.SIMPLE_HEAD if self.console.is_terminal else None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)

    def verdict(self) -> int:
        """Print the end of the story; its exit code: 0 only if it was told to its end and nothing was lost."""
        if self.findings:
            self.scene("What the client saw")
            self.table(("", "client saw", "waited", "promised", ""), [_row(finding) for finding in self.findings])
        if self.lost is not None:
            self.say(f"LOST: {self.lost}", "bold red")
            return 1
        if not self.finished:
            self.say("stopped before the end: this proves nothing", "bold yellow")
            return 1
        self.say("nothing was lost", "bold green")
        return 0


def _row(finding: Finding) -> tuple[str, ...]:
    waited = "-" if finding.seconds is None else f"{finding.seconds:.2f} s"
    promised = "-" if finding.promised is None else f"{finding.promised:.1f} s"
    return finding.what, finding.seen, waited, promised, "late, this machine is busy" if finding.late else "ok"
