"""Sets the C allocator up for large, short-lived buffers, and gives memory back when a run ends.

Tensors of a pipeline come and go by the megabyte; glibc's defaults map and unmap each of them. Imports neither torch
nor grpc, so that it can come first in main.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

from gradwire_protocol.allocator_options import M_ARENA_MAX, set_options

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

# Measured: 2.0 → 1.25 CPU seconds per GiB of 64 MiB tensors, resident memory near the peak of what is alive.
_OPTIONS = (
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, 256 * 2**20),
    (_M_TOP_PAD, 16 * 2**20),
    (M_ARENA_MAX, 1),
)


def configure(environment: Mapping[str, str] = os.environ) -> bool:
    """Set the options; return whether it was done. The user's own choice stays."""
    return set_options(_OPTIONS, environment)


def give_back() -> None:
    """Return free memory to the system, where the C library can (about 25 ms)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
