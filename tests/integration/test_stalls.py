"""Nothing hangs without a word: frozen processes, slow actions, owed messages; and what `gradwire status` says then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from slow_model import NAP, SIZE, Slow
from tcp_proxy import Fault, TcpProxy, has_bytes, proxies
from torch import nn
from typer.testing import CliRunner

import gradwire
from gradwire.calls import coordinator_stub
from gradwire.cli.app import app
from gradwire_protocol.errors import Aborted, GradwireError, Stalled, Unreachable
from gradwire_protocol.v1 import coordinator_pb2, run_pb2
from gradwire_stage.service import StageService

pytestmark = pytest.mark.fault


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, 4))


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(rows, SIZE), torch.zeros(rows, dtype=torch.int64)


def make_trainer(cluster: gradwire.Cluster, model: nn.Module | None = None, **plan: Any) -> gradwire.Trainer:
    model = model or small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fields = {"stages": 2, "microbatches": 2, "stall_seconds": 1.5, **plan}
    return cluster.trainer(model, optimizer, loss=F.cross_entropy, example=batch(), plan=gradwire.Plan(**fields))


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.02)


def free(cluster: gradwire.Cluster) -> bool:
    return not any(server.activity.run for server in cluster.status().servers)


@pytest.fixture(scope="module")
def services() -> list[StageService]:
    return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, services: list[StageService]) -> Iterator[gradwire.Cluster]:
    with cluster_in_process(
        tmp_path_factory.mktemp("coordinator"), 2, services, heartbeat_seconds=0.25, operators=NAP
    ) as made:
        yield made


def activity_of_stage(services: list[StageService], stage: int) -> Any:
    return next((a for a in (service.activity() for service in services) if stage in a.stages), None)


def owe_rows(trainer: gradwire.Trainer) -> Any:
    """Submit an evaluation whose rows never come."""
    session = trainer._session
    parts = [run_pb2.MicroBatch(index=0, first_row=0, rows=8)]
    return session.submit(run_pb2.Entry(number=session.reserve(), evaluate=run_pb2.Evaluate(micro_batches=parts)))


def test_rows_that_never_come_name_the_client(cluster: gradwire.Cluster) -> None:
    with make_trainer(cluster) as trainer:
        began = time.monotonic()
        with pytest.raises(Stalled) as caught:
            owe_rows(trainer).result(15)
        assert 1.5 <= time.monotonic() - began < 6.0
    assert caught.value.message.startswith("The client has made no progress for")
    assert "rows of micro-batch 0 (input" in caught.value.message
    assert "stall_seconds" in caught.value.expected
    wait_until(lambda: free(cluster))


def test_a_long_action_is_named_and_a_longer_limit_lets_it_be(cluster: gradwire.Cluster) -> None:
    trainer = make_trainer(cluster, Slow(30), microbatches=1, cuts=["second"], stall_seconds=1.0)
    with trainer, pytest.raises(Stalled) as caught:
        trainer.step(*batch())
    assert "has made no progress for" in caught.value.message
    assert "it is running the forward of micro-batch 0 (" in caught.value.message
    assert "raise stall_seconds in the plan" in caught.value.remedy
    wait_until(lambda: free(cluster), 60)
    with make_trainer(cluster, Slow(15), microbatches=1, cuts=["second"], stall_seconds=30) as trainer:
        trainer.step(*batch())


def test_a_step_has_a_limit_of_its_own(cluster: gradwire.Cluster) -> None:
    trainer = make_trainer(cluster, Slow(3), microbatches=8, stall_seconds=60, step_seconds=0.2)
    with trainer, pytest.raises(Stalled, match="Step 1 has taken") as caught:
        trainer.step(*batch())
    assert "step_seconds" in caught.value.remedy
    wait_until(lambda: free(cluster), 30)


def test_an_idle_run_is_no_stall(cluster: gradwire.Cluster) -> None:
    with make_trainer(cluster, stall_seconds=1.0) as trainer:
        trainer.step(*batch())
        time.sleep(3.0)
        assert trainer.step(*batch()).step == 2


def test_a_slow_link_that_moves_is_no_stall(tmp_path: Path) -> None:
    wide = 2**16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(wide, 4), nn.Tanh(), nn.Linear(4, 4))
    rows = torch.ones(32, wide), torch.zeros(32, dtype=torch.int64)  # 8 MiB
    made: list[TcpProxy] = []
    with proxies() as before:

        def advertise(address: str) -> str:
            made.append(before(address))
            return made[-1].address

        with cluster_in_process(tmp_path, 2, advertise=advertise, heartbeat_seconds=0.25) as slow:
            plan = gradwire.Plan(stages=2, microbatches=1, stall_seconds=2.0)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with slow.trainer(model, optimizer, loss=F.cross_entropy, example=rows, plan=plan) as trainer:
                for proxy in made:
                    proxy.bytes_per_second = 1.5 * 2**20
                began = time.monotonic()
                assert trainer.step(*rows).step == 1
                assert time.monotonic() - began > 4.0, "the link was not slow"


def test_status_says_who_waits_for_what(cluster: gradwire.Cluster) -> None:
    with make_trainer(cluster, stall_seconds=30) as trainer:
        owe_rows(trainer)
        time.sleep(0.7)
        text = CliRunner().invoke(app, ["status", "--coordinator", cluster.address]).output
        shown = json.loads(CliRunner().invoke(app, ["status", "--json", "--coordinator", cluster.address]).output)
        trainer._session.abort()
    (lines,) = shown["activities"].values()
    assert len(lines) == 2
    assert lines[0].startswith("stage 0 has waited ")
    assert " s for the rows of micro-batch 0 (input " in lines[0]
    assert lines[1].startswith("stage 1 has waited ")
    assert "from stage 0, which waits for rows of micro-batch 0" in lines[1] or "from the client" in lines[1]
    assert "stage 0 has waited" in text
    wait_until(lambda: free(cluster))


def test_status_says_what_the_awaited_stage_does(cluster: gradwire.Cluster) -> None:
    with make_trainer(cluster, Slow(60), microbatches=1, cuts=["second"], stall_seconds=60) as trainer:

        def step() -> None:
            with pytest.raises(GradwireError):
                trainer.step(*batch())

        stepping = threading.Thread(target=step)
        stepping.start()

        def lines() -> list[str]:
            shown = json.loads(CliRunner().invoke(app, ["status", "--json", "--coordinator", cluster.address]).output)
            return [line for run in shown["activities"].values() for line in run]

        wait_until(lambda: any("which is running the forward of micro-batch 0" in line for line in lines()))
        trainer._session.abort()
        stepping.join(10)
    wait_until(lambda: free(cluster), 60)


@pytest.mark.parametrize("phase", ["waiting", "computing", "collecting"])
def test_an_abort_reaches_every_server_within_a_second(
    cluster: gradwire.Cluster, services: list[StageService], phase: str
) -> None:
    model = Slow(20) if phase == "computing" else None
    with make_trainer(cluster, model, microbatches=4, cuts=["second" if model else 2], stall_seconds=60) as trainer:
        ended = threading.Event()
        works: dict[str, Callable[[], Any]] = {
            "waiting": lambda: owe_rows(trainer).result(),
            "computing": lambda: trainer.step(*batch()),
            # Nobody sends the rows, so nobody finishes what is collected.
            "collecting": lambda: (owe_rows(trainer), trainer.state_dict()),
        }

        def work() -> None:
            with pytest.raises(GradwireError):
                works[phase]()
            ended.set()

        threading.Thread(target=work, daemon=True).start()
        wait_until(lambda: any(service.activity().action for service in services))
        time.sleep(0.3)
        began = time.monotonic()
        trainer._session.abort()
        assert ended.wait(5)
        told = time.monotonic() - began
        # A nap in progress ends first, and no other is begun.
        wait_until(lambda: not any(service.activity().run for service in services), 5.0)
        gone = time.monotonic() - began
    # A tenth of that on a machine that has nothing else to do.
    assert told < 3.0, "the client's own wait ends"
    assert gone < (5.0 if phase == "computing" else 3.0)


def test_a_run_ended_by_another_client_reaches_its_own(cluster: gradwire.Cluster, services: list[StageService]) -> None:
    with make_trainer(cluster, stall_seconds=60) as trainer:
        future = owe_rows(trainer)
        began = time.monotonic()
        coordinator_stub(cluster.channel).EndRun(coordinator_pb2.EndRunRequest(run=trainer.run_id))
        with pytest.raises(Aborted, match="was ended"):
            future.result(5)
        assert not any(service.activity().run for service in services)
        assert time.monotonic() - began < 3.0


def test_a_coordinator_that_goes_silent_ends_the_clients_wait(
    cluster: gradwire.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection stays open, and nothing comes any more."""
    monkeypatch.setattr("gradwire.session.SILENCE_SECONDS", 3.0)
    with proxies() as before:
        proxy = before(cluster.address)
        with gradwire.connect(proxy.address) as through, make_trainer(through, stall_seconds=60) as trainer:
            trainer.step(*batch())
            proxy.fault = Fault("drop", when=has_bytes(b"\x08\x03\x10\x01\x22"))  # entry 3 goes by
            began = time.monotonic()
            with pytest.raises(Unreachable, match="has not been heard of for"):
                trainer.step(*batch())
            assert time.monotonic() - began < 8.0
    # The coordinator notices by its own pings that the client is gone.
    wait_until(lambda: free(cluster), 40)


# Real processes, which can be frozen.


@contextmanager
def frozen(process_id: int) -> Iterator[None]:
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


@pytest.fixture(scope="module")
def processes() -> Iterator[gradwire.LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        # So that it is not the lease that finds a frozen server.
        patch.setenv("GRADWIRE_COORDINATOR_LEASE_SECONDS", "60")
        with gradwire.local(stage_servers=2) as made:
            yield made


def test_a_frozen_stage_server_is_named_and_serves_again_when_it_thaws(processes: gradwire.LocalCluster) -> None:
    with make_trainer(processes, stall_seconds=3.0) as trainer:
        trainer.step(*batch())
        with frozen(processes.process_ids[1]):
            began = time.monotonic()
            with pytest.raises(Stalled) as caught:
                trainer.step(*batch())
            assert time.monotonic() - began < 12.0
    assert "has not been heard of for" in caught.value.message
    assert "its process is stopped" in caught.value.remedy
    wait_until(lambda: free(processes), 20)
    with make_trainer(processes) as trainer:
        assert trainer.step(*batch()).step == 1


def test_a_server_frozen_for_less_than_the_limit_does_no_harm(processes: gradwire.LocalCluster) -> None:
    with make_trainer(processes, stall_seconds=10.0) as trainer:
        trainer.step(*batch())
        with frozen(processes.process_ids[1]):
            thawing = threading.Timer(3.0, os.kill, (processes.process_ids[1], signal.SIGCONT))
            thawing.start()
            assert trainer.step(*batch()).step == 2
        assert trainer.step(*batch()).step == 3


def test_a_frozen_coordinator_ends_the_clients_wait(
    processes: gradwire.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwire.session.SILENCE_SECONDS", 4.0)
    with make_trainer(processes) as trainer:
        trainer.step(*batch())
        with frozen(processes.process_ids[0]):
            began = time.monotonic()
            with pytest.raises(Unreachable, match="has not been heard of"):
                trainer.step(*batch())
            assert time.monotonic() - began < 8.0


CLIENT = """
import sys, torch, torch.nn.functional as F, gradwire
model = torch.nn.Linear(8, 4)
batch = (torch.ones(8, 8), torch.zeros(8, dtype=torch.int64))
with gradwire.connect(sys.argv[1]) as cluster:
    plan = gradwire.Plan(stages=1, microbatches=2, stall_seconds=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with cluster.trainer(model, optimizer, loss=F.cross_entropy, example=batch, plan=plan) as trainer:
        while True:
            print(trainer.step(*batch).step, flush=True)
            sys.stdin.readline()
"""


def test_a_client_that_freezes_between_steps_goes_on(cluster: gradwire.Cluster) -> None:
    arguments = [sys.executable, "-c", CLIENT, cluster.address]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == "1\n"
            with frozen(client.pid):
                time.sleep(4.0)
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "2\n"
        finally:
            client.kill()
    # Its connection breaks, and that ends the run.
    wait_until(lambda: free(cluster))


def test_interrupting_a_client_in_the_middle_of_a_step_frees_the_servers_at_once(
    cluster: gradwire.Cluster, services: list[StageService]
) -> None:
    code = CLIENT
    for old, new in (
        ("trainer.step(*batch).step", "'stepping', trainer.step(*batch)"),
        ("torch.nn.Linear(8, 4)", "Slow(30)"),
        ("stall_seconds=2.0", "stall_seconds=60"),
    ):
        code = code.replace(old, new)
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); from slow_model import Slow\n{code}"
    arguments = [sys.executable, "-c", code, cluster.address]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        try:
            wait_until(lambda: any("F" in service.activity().action for service in services), 60)
            time.sleep(0.2)
            began = time.monotonic()
            client.send_signal(signal.SIGINT)
            # The naps of the action in progress, three seconds of them, end first.
            wait_until(lambda: not any(service.activity().run for service in services), 20)
            freed = time.monotonic() - began
            client.wait(10)
        finally:
            client.kill()
    assert freed < 5.0
