"""What ends a command that runs other processes."""

from __future__ import annotations

import signal


def ended_by() -> tuple[signal.Signals, ...]:
    """The signals that end it in order: also that of a terminal that closes, unless it is ignored as by `nohup`."""
    hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hung_up)
