"""A signal whose exception Python drops, since it arose in a callback, ends the command all the same."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# What Python's own imports do all the time: a weak reference's callback, here one in which the signal comes.
_PROGRAM = """
import importlib.abc, os, sys, time, weakref

class Thing:
    pass

def signal_in_a_callback():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), {number}))
    del thing
    print("still there", flush=True)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "gradwire.cli.app":
            signal_in_a_callback()

def run():
    signal_in_a_callback()
    time.sleep(60)

from gradwire import cli
if {while_importing}:
    sys.meta_path.insert(0, Finder())
else:
    import gradwire.cli.app
    gradwire.cli.app.run = run
cli.main()
"""


@pytest.mark.parametrize(
    ("number", "while_importing", "code", "out", "err"),
    [
        (signal.SIGINT, True, 130, "", "Interrupted.\n"),
        (signal.SIGINT, False, 130, "still there\n", "Interrupted.\n"),
        (signal.SIGTERM, False, 143, "still there\n", ""),
    ],
)
def test_a_signal_in_a_callback_is_not_lost(number: int, while_importing: bool, code: int, out: str, err: str) -> None:
    program = _PROGRAM.format(number=int(number), while_importing=while_importing)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=15)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, out, err)


def test_what_else_python_drops_is_told_as_ever() -> None:
    program = """
import gradwire.cli.app
from gradwire import cli

class Broken:
    def __del__(self):
        raise SystemExit("of its own")

def run():
    Broken()

gradwire.cli.app.run = run
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=15)
    assert ended.returncode == 0
    assert "SystemExit: of its own" in ended.stderr
