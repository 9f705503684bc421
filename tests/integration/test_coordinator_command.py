"""The gradwire-coordinator command as a real process: ready, signals, its parent's end, errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from gradwire_protocol.channels import open_channel
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc

COMMAND = [sys.executable, "-m", "gradwire_coordinator"]


@contextmanager
def coordinator(*flags: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """Start one on free ports; yield it and what it reported when it was ready."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [
            *COMMAND,
            *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--ready-fd", str(writing)),
            "--watch-stdin",
            *flags,
        ],
        pass_fds=[writing],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as ready:
            yield process, json.loads(ready.readline())
    finally:
        process.kill()
        process.wait()
        stdin: IO[bytes] | None = process.stdin
        if stdin is not None:
            stdin.close()


def test_it_serves_and_stops_in_good_order(tmp_path: Path) -> None:
    with coordinator("--state-dir", str(tmp_path / "state")) as (process, ready):
        with open_channel(ready["address"]) as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            assert stub.GetStatus(coordinator_pb2.GetStatusRequest()).version
        assert ready["metrics_address"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    assert (tmp_path / "state" / "runs.sqlite").is_file()


def test_it_ends_with_its_parent() -> None:
    with coordinator() as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(5) == 0


def test_it_costs_next_to_nothing_when_nothing_happens() -> None:
    with coordinator() as (process, ready), open_channel(ready["address"]) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        stub.GetStatus(coordinator_pb2.GetStatusRequest())
        stat = Path(f"/proc/{process.pid}/stat")
        if not stat.exists():
            pytest.skip("needs /proc")

        def ticks() -> int:
            fields = stat.read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        time.sleep(2)
        used_seconds = (ticks() - before) / os.sysconf("SC_CLK_TCK")
        assert used_seconds / 2 < 0.02


def test_leases_outlive_a_stop_of_the_coordinator_itself() -> None:
    """While it is stopped it cannot hear heartbeats, so that time does not count."""
    with (
        coordinator("--lease-seconds", "2", "--heartbeat-seconds", "1") as (process, ready),
        open_channel(ready["address"]) as channel,
    ):
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        stub.Register(
            coordinator_pb2.RegisterRequest(
                server="a", role=coordinator_pb2.SERVER_ROLE_STAGE, address="127.0.0.1:7000"
            )
        )
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert [server.server for server in stub.GetStatus(coordinator_pb2.GetStatusRequest()).servers] == ["a"]


def test_a_busy_port_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run([*COMMAND, "--listen", address], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert f"Cannot listen on {address}" in done.stderr
    assert "choose another" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_setting_is_said() -> None:
    done = subprocess.run([*COMMAND, "--lease-seconds", "0.1"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "lease_seconds" in done.stderr
    assert "Traceback" not in done.stderr


def test_plaintext_off_loopback_is_refused() -> None:
    done = subprocess.run([*COMMAND, "--listen", "0.0.0.0:0"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "Plaintext" in done.stderr
