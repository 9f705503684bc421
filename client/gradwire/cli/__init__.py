"""The command line's entry point. Imports nothing of weight, so that Ctrl-C is handled from the first moment on."""

from __future__ import annotations

import gc
import sys

_INTERRUPTED = 130


def main() -> None:
    """Run `gradwire` and exit: 0 done, 2 wrong input, 1 a failure, 130 interrupted."""
    code: str | int | None = None
    try:
        from gradwire.cli.interrupts import end_on_signals

        end_on_signals()
        # Imports what takes a moment.
        from gradwire.cli.app import run

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
        print("Interrupted.", file=sys.stderr)
    # The memory goes as a whole: no last look through all objects for garbage, which takes torch's half a second.
    gc.freeze()
    sys.exit(code)
