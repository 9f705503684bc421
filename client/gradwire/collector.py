"""Python's search for cyclic garbage: when it is in the way.

Imports and exports make hundreds of thousands of objects that stay. Python looks through all of them again and again
meanwhile: a third of the time that importing torch takes, and a fifth of an export's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Leave cyclic garbage for later, while much is made that stays. Also a decorator."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
