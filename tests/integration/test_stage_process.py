"""The stage server as a process: it registers, heartbeats, comes back, and leaves in good order."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
import torch
from stage_cluster import Cluster, wait_until
from tcp_proxy import Fault, proxies

from gradwire_protocol.channels import open_channel
from gradwire_protocol.errors import ErrorInterceptor, RunNotFound, Unreachable
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc, run_pb2, stage_pb2, stage_pb2_grpc
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.membership import Membership


class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Only membership: what came, as (call, request)."""

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.calls: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self.forgets = threading.Event()
        self.server = grpc.server(
            futures.ThreadPoolExecutor(8), interceptors=(ErrorInterceptor(),), options=[("grpc.so_reuseport", 0)]
        )
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(address)}"

    def Register(self, request, context):
        self.calls.put(("register", request))
        return coordinator_pb2.RegisterReply(lease_seconds=5, heartbeat_seconds=0.05)

    def Heartbeat(self, request, context):
        if self.forgets.is_set():
            self.forgets.clear()
            raise RunNotFound("Unknown server")
        self.calls.put(("heartbeat", request))
        return coordinator_pb2.HeartbeatReply()

    def Deregister(self, request, context):
        self.calls.put(("deregister", request))
        return coordinator_pb2.DeregisterReply()

    def next(self, call: str, seconds: float = 30.0):
        """Wait for a call of that name, passing over heartbeats."""
        while True:
            name, request = self.calls.get(timeout=seconds)
            if name == call:
                return request
            assert name == "heartbeat", f"{name} came before {call}"


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    yield made
    made.server.stop(0).wait()


def start(*flags: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "gradwire_stage", *flags],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        close_fds=False,
    )


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to be ended, whatever the test does."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_server_lives_and_leaves_in_good_order(coordinator, running, tmp_path) -> None:
    coordinator.server.start()
    settings = tmp_path / "stage.toml"
    settings.write_text(f'coordinator = "{coordinator.address}"\ndevice = "cuda:7"\nthreads = 3\n')
    read, write = os.pipe()
    os.set_inheritable(write, True)
    process = start(
        "--config",
        str(settings),
        "--device",
        "cpu",
        "--ready-fd",
        str(write),
        "--watch-stdin",
        environment={"GRADWIRE_STAGE_THREADS": "2", "GRADWIRE_STAGE_SERVER": "from-the-environment"},
    )
    running.append(process)
    os.close(write)
    with os.fdopen(read) as ready:
        addresses = json.loads(ready.readline())
    registration = coordinator.next("register")
    assert registration.server == "from-the-environment"
    assert registration.role == coordinator_pb2.SERVER_ROLE_STAGE
    assert registration.address == addresses["address"]
    assert registration.metrics_address == addresses["metrics_address"]
    assert registration.device.kind == "cpu"  # the flag wins over the file
    assert registration.device.threads == 2  # the environment wins over the file
    assert min(registration.device.memory_bytes, registration.device.flops_per_second) > 0
    assert coordinator.next("heartbeat").server == registration.server
    with open_channel(addresses["address"]) as channel:
        reply = stage_pb2_grpc.StageServiceStub(channel).GetActivity(stage_pb2.GetActivityRequest(), timeout=5)
        assert reply.activity == stage_pb2.Activity()
    with urllib.request.urlopen(f"http://{addresses['metrics_address']}/metrics", timeout=5) as page:
        assert b"gradwire_info{role=" in page.read()
    process.send_signal(signal.SIGTERM)
    assert coordinator.next("deregister").server == registration.server
    assert process.wait(10) == 0


def test_it_ends_when_its_parent_does(coordinator, running) -> None:
    coordinator.server.start()
    process = start("--coordinator", coordinator.address, "--watch-stdin")
    running.append(process)
    coordinator.next("register")
    process.stdin.close()
    process.stdin = None
    coordinator.next("deregister")
    assert process.wait(10) == 0


def test_a_killed_server_ends_the_run_of_its_peers(coordinator, running) -> None:
    coordinator.server.start()
    process = start("--coordinator", coordinator.address, "--server", "B", "--device", "cpu")
    running.append(process)
    address = coordinator.next("register").address
    with Cluster({"A": [0], "B": [1, 2]}, remote={"B": address}) as cluster:
        cluster.open()
        x = torch.randn(6, 4, dtype=torch.float64)
        cluster.submit_step(x, x, 3)
        cluster.reports()
        # B waits for rows that never come, and A for B's gradient.
        entry = cluster.next_entry(train_step=run_pb2.TrainStep(step=2))
        entry.train_step.micro_batches.add(rows=6)
        cluster.send("A", entry.number, 0, "x", x, pb.DIRECTION_BATCH)
        cluster.streams["B"].submit(entry, "1F0 2F0 2B0 1B0 REDUCE UPDATE")
        cluster.streams["A"].submit(entry, "0F0 0B0 REDUCE UPDATE")
        wait_until(lambda: cluster.servers["A"].activity().waiting_for.startswith("backward of micro-batch 0"))
        wait_until(lambda: cluster.servers["B"].activity().waiting_for.startswith("rows of micro-batch 0 (input 'y')"))
        process.kill()
        error = cluster.streams["A"].failure()
        assert isinstance(error, Unreachable)
        assert "Stage 0, in action 0B0 of entry 3" in str(error)
        assert f"stage server B at {address}" in str(error)
        wait_until(lambda: cluster.servers["A"].activity().run == "")


def test_wrong_settings_end_it_with_one_message(running) -> None:
    process = start("--coordinator", "127.0.0.1:1", "--listen", "0.0.0.0:0")
    running.append(process)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "Plaintext is allowed on loopback only" in error.decode()
    assert "Traceback" not in error.decode()


def test_membership_waits_for_a_coordinator_and_comes_back_to_it(coordinator) -> None:
    registration = coordinator_pb2.RegisterRequest(server="s", address="127.0.0.1:1")
    activity = stage_pb2.Activity(run="r", progress=7)
    with open_channel(coordinator.address) as channel:
        reasons = queue.SimpleQueue()
        membership = Membership(channel, coordinator.address, registration, lambda: activity, on_orphaned=reasons.put)
        membership.start()
        with pytest.raises(queue.Empty):
            coordinator.next("register", 0.3)  # it does not listen yet
        coordinator.server.start()
        assert coordinator.next("register") == registration
        assert coordinator.next("heartbeat").activity == activity
        assert reasons.empty()
        coordinator.forgets.set()
        assert coordinator.next("register") == registration
        # A run that it had before it was started again is nobody's.
        assert "does not know this server" in reasons.get(timeout=5)
        membership.stop()
        assert coordinator.next("deregister").server == "s"


def test_membership_outlives_a_restarted_coordinator(coordinator) -> None:
    registration = coordinator_pb2.RegisterRequest(server="s", address="127.0.0.1:1")
    coordinator.server.start()
    with open_channel(coordinator.address) as channel:
        membership = Membership(channel, coordinator.address, registration, stage_pb2.Activity)
        membership.start()
        coordinator.next("register")
        coordinator.next("heartbeat")
        coordinator.server.stop(0).wait()
        successor = Coordinator(coordinator.address)
        successor.forgets.set()
        successor.server.start()
        assert successor.next("register") == registration
        membership.stop()
        successor.next("deregister")
        successor.server.stop(0).wait()


def test_a_run_is_let_go_when_its_coordinator_answers_no_more(coordinator) -> None:
    """The connection stays open: only heartbeats without an answer tell."""
    registration = coordinator_pb2.RegisterRequest(server="s", address="127.0.0.1:1")
    coordinator.server.start()
    reasons = queue.SimpleQueue()
    with proxies() as before:
        proxy = before(coordinator.address)
        with open_channel(proxy.address) as channel:
            membership = Membership(
                channel, proxy.address, registration, stage_pb2.Activity, on_orphaned=reasons.put, silence_seconds=4.0
            )
            membership.start()
            coordinator.next("register")
            coordinator.next("heartbeat")
            proxy.fault = Fault("drop", at_bytes=1)
            assert "has not answered for 5 s" in reasons.get(timeout=20)
            membership.stop()
