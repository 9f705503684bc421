"""The command line's entry point. Imports nothing of weight, so that Ctrl-C is handled from the first moment on."""

from __future__ import annotations

import gc
import os
import signal
import sys

_INTERRUPTED = 130
_MESSAGE = "Interrupted."


def main() -> None:
    """Run `gradwire` and exit: 0 done, 2 wrong input, 1 a failure, 130 interrupted."""
    code: str | int | None = None
    # A signal that was ignored from outside (nohup) stays ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        # Imports what takes a moment.
        from gradwire.cli.app import run
        from gradwire.cli.interrupts import end_on_signals

        end_on_signals()
        run()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except SystemExit as exit_:
        code = exit_.code
    except Exception:
        from gradwire.cli.interrupts import exit_code

        # Foreign code makes other exceptions of an interrupt: numpy, in the middle of its import, a RecursionError.
        code = exit_code()
        if code is None:
            raise
    if code == _INTERRUPTED:
        print(_MESSAGE, file=sys.stderr)
    # The memory goes as a whole: no last look through all objects for garbage, which takes torch's half a second.
    gc.freeze()
    sys.exit(code)


def _end_at_once(number: int, frame: object) -> None:
    """End while nothing is begun yet. An exception would get lost in the callbacks that the imports make so many of."""
    os.write(2, f"{_MESSAGE}\n".encode())
    os._exit(_INTERRUPTED)
