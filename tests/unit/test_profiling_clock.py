"""The clock of measurements: what the thread does counts, sleeping included, and what others do does not."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from gradwire_stage import profiling_clock
from gradwire_stage.device import CpuDevice, Device
from gradwire_stage.profiling_clock import ThreadClock, open_clock
from gradwire_stage.profiling_runs import GroupRunner
from gradwire_stage.timeline import HostClock


def spin(seconds: float) -> None:
    """Compute for so long, by the time on a processor."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_waiting_for_a_processor_does_not_count() -> None:
    processors = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * processors)]
    try:
        with open_clock(CpuDevice(1)) as clock:
            assert isinstance(clock, ThreadClock)
            started = time.perf_counter()
            marks = [clock.mark()]
            for _ in range(3):
                spin(0.1)
                marks.append(clock.mark())
            wall = time.perf_counter() - started
        own = sum(clock.elapsed(marks)) / 1e9
        assert 0.29 < own < 0.45
        assert wall > 1.5 * own
    finally:
        for process in others:
            process.kill()
            process.wait()


def test_sleeping_counts() -> None:
    with open_clock(CpuDevice(1)) as clock:
        first = clock.mark()
        time.sleep(0.05)
        (elapsed,) = clock.elapsed([first, clock.mark()])
    # Not when the thread is woken, but when it gets a processor, does the waiting begin that does not count.
    assert 0.049 < elapsed / 1e9 < 0.15


def test_without_an_account_of_threads_the_plain_clock_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling_clock, "_SCHEDULING", "/nowhere/schedstat")
    with open_clock(CpuDevice(1)) as clock:
        assert type(clock) is HostClock


def test_a_gpu_has_a_clock_of_its_own() -> None:
    class Gpu:
        torch_device = torch.device("cuda", 0)

        def clock(self) -> Any:
            return "events"

    with open_clock(cast(Device, Gpu())) as clock:
        assert clock == "events"


def test_what_is_taken_off_every_group_is_no_first_run_however_slow_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it was: all groups of a small model then seemed to take no time."""

    class Counting(HostClock):
        runs = 0

        def elapsed(self, marks: Sequence[int]) -> list[int]:
            self.runs += 1
            return super().elapsed(marks)

    clock = Counting()
    now = itertools.count(0.0, 10.0)
    with monkeypatch.context() as slow:
        slow.setattr(time, "perf_counter", lambda: next(now))
        GroupRunner(torch.device("cpu"), clock, None, {})
    assert clock.runs >= 9
