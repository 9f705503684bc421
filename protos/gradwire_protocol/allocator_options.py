"""Options of the C library's allocator, for whole processes.

Imports little, so that it can come first in main: what threads have got by then stays as it is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence

# How many pools of memory the threads share.
M_ARENA_MAX = -8


def set_options(options: Sequence[tuple[int, int]], environment: Mapping[str, str] = os.environ) -> bool:
    """Set options, pairs as of mallopt(3); return whether it was done.

    Leaves everything alone where the C library has no mallopt, and where the user has chosen an allocator or its
    options (LD_PRELOAD, MALLOC_*, GLIBC_TUNABLES).
    """
    if any(name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES") for name in environment):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = [mallopt(option, value) == 1 for option, value in options]  # each is tried, whatever the others gave
    return all(done)


def use_one_arena() -> None:
    """Have all threads share one pool, so that what one has freed is there for the others.

    With the usual eight for each processor, ten thousand connections that came and went again and again took 1 GiB;
    with one, 550 MiB.
    """
    set_options([(M_ARENA_MAX, 1)])
