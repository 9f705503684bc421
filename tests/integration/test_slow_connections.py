"""Ten thousand connections that never come to a request: training goes on, memory and descriptors stay bounded."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import grpc
import psutil
import pytest
import slow_callers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_tls_cluster import TlsCluster, train

import gradwire
from gradwire.local_cluster import LocalProcesses
from gradwire.service_process import end_all
from gradwire_protocol.channels import SERVER_OPTIONS, open_channel
from gradwire_protocol.connection_limit import MAXIMUM_CONNECTIONS
from gradwire_protocol.tls_files import TlsFiles

pytestmark = pytest.mark.fault

COUNT = 10_000
# Measured with ten thousand of each kind, opened and closed five times: 25 to 46 KiB in plaintext, 46 to 55 over TLS,
# half of it while they are all closed at once.
CONNECTION_BYTES = 64 * 2**10
# A few connections that training opens or closes meanwhile.
OTHER_DESCRIPTORS = 16
HANDSHAKE_SECONDS = dict(SERVER_OPTIONS)["grpc.server_handshake_timeout_ms"] / 1e3

needs_descriptors = pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < MAXIMUM_CONNECTIONS + 1024,
    reason="a process may have too few descriptors here for ten thousand connections",
)


@dataclass(frozen=True)
class Watched:
    """A service, and what it had before strangers came."""

    address: str
    process: psutil.Process
    memory_bytes: int
    descriptors: int

    @classmethod
    def of(cls, address: str, process_ids: list[int]) -> Watched:
        port = int(address.rpartition(":")[2])
        (process,) = [
            process
            for process in map(psutil.Process, process_ids)
            if any(item.laddr.port == port and item.status == psutil.CONN_LISTEN for item in process.net_connections())
        ]
        return cls(address, process, process.memory_info().rss, process.num_fds())

    def check_memory(self) -> None:
        grown = self.process.memory_info().rss - self.memory_bytes
        assert grown < COUNT * CONNECTION_BYTES, f"{grown / COUNT / 2**10:.0f} KiB a connection"

    def wait_held(self) -> None:
        """Wait until it has taken them all."""
        wait_until(lambda: self.process.num_fds() >= self.descriptors + COUNT - OTHER_DESCRIPTORS, 20)

    def is_released(self) -> bool:
        """Whether they are all gone."""
        return self.process.num_fds() <= self.descriptors + OTHER_DESCRIPTORS


def wait_until(condition: object, seconds: float) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Besieged:
    """A cluster, its coordinator and one of its stage servers under the eyes of strangers."""

    def __init__(
        self, cluster: gradwire.Cluster, coordinator: str, process_ids: list[int], tls: TlsFiles | None
    ) -> None:
        self.cluster, self.tls = cluster, tls
        self.expected = train(cluster, steps=20)[0]
        addresses = (coordinator, cluster.status().servers[0].address)
        self.services = [Watched.of(address, process_ids) for address in addresses]

    @contextmanager
    def strangers(self) -> Iterator[None]:
        """Ten thousand of them before each of the two services."""
        kinds = slow_callers.PLAINTEXT if self.tls is None else slow_callers.TLS
        with ExitStack() as stack:
            opening = [
                stack.enter_context(slow_callers.slow_callers(service.address, COUNT, kinds))
                for service in self.services
            ]
            for wait_open in opening:
                wait_open()
            for service in self.services:
                service.wait_held()
            yield

    def check_work(self) -> None:
        """A run that begins now gives what it gave before, and whoever belongs here gets in."""
        assert train(self.cluster, steps=20)[0] == self.expected
        began = time.monotonic()
        with gradwire.connect(self.services[0].address, self.tls) as another:
            assert len(another.status().servers) == 2
        assert time.monotonic() - began < 5

    def check_memory(self) -> None:
        for service in self.services:
            service.check_memory()

    def is_released(self) -> bool:
        return all(service.is_released() for service in self.services)

    def wait_released(self) -> None:
        wait_until(self.is_released, 15)


@pytest.fixture(scope="module", params=[False, True], ids=["plaintext", "tls"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    with ExitStack() as stack:
        if request.param:
            made = TlsCluster(tmp_path_factory.mktemp("besieged"))
            stack.callback(end_all, made.processes[:1], 5.0)
            stack.callback(end_all, made.processes[1:], 5.0)
            cluster = stack.enter_context(made.connect())
            ids = [process.process_id for process in made.processes]
            yield Besieged(cluster, made.coordinator.address, ids, made.client)
        else:
            processes = stack.enter_context(LocalProcesses(stage_servers=2))
            cluster = stack.enter_context(gradwire.connect(processes.address))
            processes.wait_registered(cluster)
            yield Besieged(cluster, processes.address, processes.process_ids, None)


@needs_descriptors
def test_ten_thousand_strangers_stop_nothing(site: Besieged) -> None:
    with site.strangers():
        site.check_work()
        site.check_memory()
    site.wait_released()
    # What the first ones took is there for the next.
    with site.strangers():
        site.check_memory()
    site.wait_released()
    site.check_memory()
    site.check_work()


@needs_descriptors
@pytest.mark.parametrize("site", [True], ids=["tls"], indirect=True)
def test_strangers_who_stay_are_shown_the_door(site: Besieged) -> None:
    """A run that goes on all the while does each of its steps."""
    left: list[float] = []

    def between(step: int) -> None:
        time.sleep(0.05)
        if step % 10 == 0 and not left and site.is_released():
            left.append(time.monotonic())

    with site.strangers():
        began = time.monotonic()
        losses: list[float] = []
        while not left:
            assert time.monotonic() - began < HANDSHAKE_SECONDS + 5, "they are still there"
            losses, _ = train(site.cluster, steps=60, between=between)
            assert len(losses) == 60
            assert losses[:20] == site.expected
    site.check_memory()


FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 400))
from gradwire_protocol.serving import Service, ServiceSettings, configure_logging
configure_logging()
service = Service("few", ServiceSettings(ready_fd=1))
service.start()
service.report_ready()
sys.stdin.read()
service.stop()
"""


def test_few_descriptors_are_kept_for_what_needs_them() -> None:
    """The service raises its limit to the 400 that it may have, and takes connections for three quarters of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", FEW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = json.loads(process.stdout.readline())["address"]
        with open_channel(address) as known:
            health = health_pb2_grpc.HealthStub(known)
            health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            with slow_callers.slow_callers(address, 500, ("silent",)) as wait_open:
                wait_open()
                time.sleep(0.5)
                assert 290 < psutil.Process(process.pid).num_fds() < 330
                health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                with open_channel(address) as late, pytest.raises(grpc.RpcError):
                    health_pb2_grpc.HealthStub(late).Check(health_pb2.HealthCheckRequest(), timeout=1)
            with open_channel(address) as late:
                check = health_pb2_grpc.HealthStub(late).Check
                check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
    finally:
        process.stdin.close()
        assert process.wait(15) == 0
        process.stdout.close()
