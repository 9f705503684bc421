"""The seconds in which a process ran, and the checks that go with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from gradwire.liveness import Liveness


def test_checks_are_called_each_second_until_the_end() -> None:
    liveness = Liveness("test")
    seen: list[float] = []
    liveness.add(lambda: seen.append(liveness.seconds))
    time.sleep(2.6)
    liveness.stop()
    assert len(seen) == 2
    assert 1.5 < seen[-1] < 3.5
    time.sleep(1.2)
    assert len(seen) == 2


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    code = """
import time
from gradwire.liveness import Liveness
liveness = Liveness("test")
time.sleep(1.3)
print("ready", flush=True)
input()
time.sleep(1.3)
print(liveness.seconds)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4.0)
        os.kill(process.pid, signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=20)
    assert 1.0 < float(out) < 5.0
