"""Ctrl-C and SIGTERM end the command in order, from any moment on, and within a limit even if something hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# The children watch this process: when it goes, they go.
_LIMIT_SECONDS = 20.0
_AGAIN_SECONDS = 0.01
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []


def end_on_signals() -> None:
    """Turn the signals into exceptions, so that every `with` block on the way out does its work."""
    for number in _SIGNALS:
        # A signal that was ignored from outside (nohup) stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    sys.unraisablehook = _raise_again(sys.unraisablehook)


def exit_code() -> int | None:
    """Return the code to exit with, 128 + the first signal that came; None if none has."""
    return 128 + _received[0] if _received else None


@contextmanager
def asking_first(ask: Callable[[], bool], grace_seconds: float) -> Iterator[None]:
    """Within the block, have SIGTERM ask for the end, and end the command only if there is none within the grace.

    `ask` returns whether anybody was there to be asked; it is called in the signal's handler. A second SIGTERM does not
    ask.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not ask():
            _end(number, frame)
            return
        asked = True
        _exit_after(grace_seconds + _LIMIT_SECONDS, number)
        # The main thread gets the signal once more, when the grace is over.
        timer = threading.Timer(grace_seconds, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    previous = signal.getsignal(signal.SIGTERM)
    if previous is not _end:
        # Ignored from outside, or somebody else's.
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(number: int, frame: FrameType | None) -> None:
    if number not in _received:
        _received.append(number)
        # Foreign code may swallow the exception: the timer does not get lost.
        _exit_after(_LIMIT_SECONDS, number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _exit_after(seconds: float, number: int) -> None:
    timer = threading.Timer(seconds, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def _raise_again(previous: Callable[[sys.UnraisableHookArgs], object]) -> Callable[[sys.UnraisableHookArgs], None]:
    """Return a hook that has a signal come again if its exception arose where Python drops exceptions.

    That is so in a destructor, in a callback of a weak reference, and in the collector's callbacks.
    """

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not _received or not issubclass(unraisable.exc_type, (KeyboardInterrupt, SystemExit)):
            previous(unraisable)
            return
        # By a timer: raised from here, the exception would be dropped as well.
        timer = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), _received[-1]))
        timer.daemon = True
        timer.start()

    return hook
