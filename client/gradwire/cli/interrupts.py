"""Ctrl-C and SIGTERM end the command in order, from any moment on, and within a limit even if something hangs."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

# The children watch this process: when it goes, they go.
_LIMIT_SECONDS = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []


def end_on_signals() -> None:
    """Turn the signals into exceptions, so that every `with` block on the way out does its work."""
    for number in _SIGNALS:
        # A signal that was ignored from outside (nohup) stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def exit_code() -> int | None:
    """Return the code to exit with, 128 + the first signal that came; None if none has."""
    return 128 + _received[0] if _received else None


def _end(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    # An exception can get lost in a callback of foreign code: the timer does not.
    timer = threading.Timer(_LIMIT_SECONDS, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
