"""The clock that operators are timed by: time in which other processes had the processor does not count.

Machines do other things while they measure: they start the next server, and their user compiles something. Sleeping and
waiting count, for those an operator does itself. Leaves GPUs to their own clock (`device.py`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradwire_stage.device import Device
from gradwire_stage.timeline import Clock, HostClock

# Nanoseconds of the thread that opens it: on a processor, and ready for one that others had (Linux).
_SCHEDULING = Path("/proc/thread-self/schedstat")
_MAXIMUM_BYTES = 100


class ThreadClock(HostClock):
    """The host's clock, less what its thread has waited for a processor."""

    def __init__(self, scheduling: int) -> None:
        self._scheduling = scheduling

    def mark(self) -> int:
        before = self._waited()
        while True:
            now = time.perf_counter_ns()
            # If it lost the processor in between, that wait would count here, and be taken off the next span.
            if (after := self._waited()) == before:
                return now - after
            before = after

    def _waited(self) -> int:
        _, waited, *_ = os.pread(self._scheduling, _MAXIMUM_BYTES, 0).split()
        return int(waited)


@contextlib.contextmanager
def open_clock(device: Device) -> Iterator[Clock[Any]]:
    """Give the clock of a device for the calling thread; the plain one where the system keeps no account of threads."""
    try:
        scheduling = os.open(_SCHEDULING, os.O_RDONLY) if device.torch_device.type == "cpu" else None
    except OSError:
        scheduling = None
    if scheduling is None:
        yield device.clock()
        return
    try:
        yield ThreadClock(scheduling)
    finally:
        os.close(scheduling)
