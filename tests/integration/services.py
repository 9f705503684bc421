"""A coordinator and stage servers as processes that a test stops, kills and starts again, on one state directory."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import gradwire
from gradwire.service_process import ServiceProcess, end_all


class Services:
    """Use `with`. The coordinator keeps its address over restarts."""

    def __init__(self, folder: Path, *, stages: int = 2, grace_seconds: float = 20.0) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir()
        self._grace_seconds = grace_seconds
        self.coordinator_address = f"127.0.0.1:{free_port()}"
        self._started = 0
        self._ended: list[ServiceProcess] = []
        self.coordinator = self._start_coordinator()
        self.stages = [self.start_stage() for _ in range(stages)]

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        end_all([*self.stages, *self._ended, self.coordinator], 10)

    def restart_coordinator(self) -> None:
        """Start it again, when it has ended."""
        self._ended.append(self.coordinator)
        self.coordinator = self._start_coordinator()

    def replace_stage(self, stage: ServiceProcess) -> None:
        """Start another, in the place of one that has ended."""
        self._ended.append(stage)
        self.stages[self.stages.index(stage)] = self.start_stage()

    def _start_coordinator(self) -> ServiceProcess:
        coordinator = self._start(
            "gradwire_coordinator",
            *("--listen", self.coordinator_address, "--state-dir", str(self.folder / "state")),
            *("--lease-seconds", "2", "--heartbeat-seconds", "0.2"),
        )
        coordinator.wait_ready(time.monotonic() + 60)
        return coordinator

    def start_stage(self) -> ServiceProcess:
        return self._start("gradwire_stage", "--listen", "127.0.0.1:0", "--coordinator", self.coordinator_address)

    def _start(self, module: str, *flags: str) -> ServiceProcess:
        self._started += 1
        name = f"{module}-{self._started}"
        shared = ("--checkpoint-root", str(self.checkpoints), "--grace-seconds", str(self._grace_seconds))
        return ServiceProcess(
            name, module, [*flags, *shared, "--metrics-listen", "127.0.0.1:0"], self.folder / f"{name}.log"
        )

    def connect(self, stages: int = 2) -> gradwire.Cluster:
        """Connect, when so many stage servers have registered."""
        deadline = time.monotonic() + 60
        while True:
            try:
                cluster = gradwire.connect(self.coordinator_address)
            except gradwire.Unreachable:
                assert time.monotonic() < deadline
                continue
            if len(cluster.status().servers) == stages:
                return cluster
            cluster.close()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def stage_of(self, server: str) -> ServiceProcess:
        """The process of a server, by the name that is in its log."""
        (found,) = [stage for stage in self.stages if server in stage.log.read_text()]
        return found


def send(process: ServiceProcess, number: signal.Signals) -> None:
    os.kill(process.process_id, number)


def code_of(process: ServiceProcess, within_seconds: float) -> int:
    """Wait for the end of a process; return its exit code."""
    assert process.wait_ended(time.monotonic() + within_seconds), f"{process.name} has not ended"
    code = process.exit_code
    assert code is not None
    return code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
