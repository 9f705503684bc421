from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gradwire.service_process import ServiceProcess, end_all
from gradwire_protocol.errors import SettingsError, Unreachable

READY = """
import json, os, sys, time, signal
descriptor = int(sys.argv[sys.argv.index("--ready-fd") + 1])
{setup}
os.write(descriptor, json.dumps({{"address": "127.0.0.1:1", "metrics_address": sys.argv[1]}}).encode() + b"\\n")
os.close(descriptor)
{after}
"""

Start = Callable[..., ServiceProcess]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a process that runs the given lines, as a module of its own."""
    started: list[ServiceProcess] = []
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start_one(source: str, name: str = "little") -> ServiceProcess:
        (tmp_path / f"{name}_service.py").write_text(source)
        process = ServiceProcess(name, f"{name}_service", ["first"], tmp_path / f"{name}.log")
        started.append(process)
        return process

    yield start_one
    end_all(started, 0.0)


def soon() -> float:
    return time.monotonic() + 10.0


def test_a_ready_service_reports_its_addresses(start: Start) -> None:
    process = start(READY.format(setup="", after="time.sleep(60)"))
    ready = process.wait_ready(soon())
    assert (ready.address, ready.metrics_address) == ("127.0.0.1:1", "first")
    process.check_running()
    assert os.getpgid(process.process_id) != os.getpgid(0)


@pytest.mark.parametrize(("code", "kind"), [(1, Unreachable), (2, SettingsError)])
def test_a_service_that_dies_at_its_start_shows_its_log(start: Start, code: int, kind: type[Exception]) -> None:
    process = start(f"import sys\nprint('the port is busy')\nsys.exit({code})")
    with pytest.raises(kind, match="the port is busy") as caught:
        process.wait_ready(soon())
    assert f"exit code {code}" in str(caught.value)


def test_a_service_that_does_not_get_ready_is_an_error_in_time(start: Start) -> None:
    process = start("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    began = time.monotonic()
    with pytest.raises(Unreachable, match="did not start in time"):
        process.wait_ready(began + 0.5)
    assert time.monotonic() - began < 3.0


def test_a_service_that_was_killed_names_the_signal(start: Start) -> None:
    process = start(READY.format(setup="", after="time.sleep(60)"))
    process.wait_ready(soon())
    os.kill(process.process_id, signal.SIGKILL)
    assert process.wait_ended(soon())
    with pytest.raises(Unreachable, match="SIGKILL"):
        process.check_running()


def test_ending_is_orderly_where_it_can_be_and_certain_where_not(start: Start) -> None:
    obedient = start(READY.format(setup="", after="time.sleep(60)"), "obedient")
    deaf = start(READY.format(setup="signal.signal(signal.SIGTERM, signal.SIG_IGN)", after="time.sleep(60)"), "deaf")
    for process in (obedient, deaf):
        process.wait_ready(soon())
    began = time.monotonic()
    end_all([obedient, deaf], 0.5)
    assert time.monotonic() - began < 3.0
    for process in (obedient, deaf):
        assert not psutil.pid_exists(process.process_id)
    end_all([obedient, deaf], 0.5)


def test_ending_closes_the_pipe_that_the_child_watches(start: Start) -> None:
    process = start(
        READY.format(
            setup="signal.signal(signal.SIGTERM, signal.SIG_IGN)",
            after="sys.stdin.read()\nprint('my parent has let go of me', flush=True)",
        )
    )
    process.wait_ready(soon())
    end_all([process], 5.0)
    assert "let go of me" in process.log.read_text()


def test_no_descriptor_is_left_open(start: Start) -> None:
    before = len(os.listdir("/proc/self/fd"))
    process = start(READY.format(setup="", after=""))
    process.wait_ready(soon())
    end_all([process], 5.0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_module_in_the_working_directory_does_not_stand_in(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(elsewhere)
    start(READY.format(setup="", after="time.sleep(60)")).wait_ready(soon())
