"""However a local cluster ends, or a part of it: one error, told at once, and no process stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from test_local_cluster import make_batches, make_model, make_trainer

import gradwire

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def fragile() -> Iterator[gradwire.LocalCluster]:
    """For the two tests that kill of it, one after the other: first a stage server, then the coordinator."""
    with gradwire.local(stage_servers=2) as cluster:
        children = [psutil.Process(number) for number in cluster.process_ids]
        yield cluster
    assert not any(child.is_running() for child in children)


def test_a_server_that_vanishes_ends_the_run_with_one_error(fragile: gradwire.LocalCluster) -> None:
    trainer = make_trainer(fragile, make_model())
    trainer.step(*make_batches(8)[0])
    began = time.monotonic()
    results = trainer.run(make_batches(8), steps=100_000)
    os.kill(fragile.process_ids[-1], signal.SIGKILL)
    with pytest.raises(gradwire.StageFailed) as caught:
        for _ in results:
            pass
    assert time.monotonic() - began < 10.0
    assert "Stage" in caught.value.message
    assert caught.value.remedy
    # Whoever asks later gets the same.
    with pytest.raises(gradwire.StageFailed):
        trainer.step(*make_batches(8)[0])
    with pytest.raises(gradwire.StageFailed):
        trainer.state_dict()
    deadline = time.monotonic() + 10.0
    while any(server.activity.run for server in fragile.status().servers):
        assert time.monotonic() < deadline, "the other server is not free again"
        time.sleep(0.1)
    trainer.close()


def test_a_coordinator_that_vanishes_ends_the_run_with_one_error(fragile: gradwire.LocalCluster) -> None:
    trainer = make_trainer(fragile, make_model(), plan=gradwire.Plan(stages=1))
    results = trainer.run(make_batches(8), steps=100_000)
    next(results)
    os.kill(fragile.process_ids[0], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(gradwire.Unreachable, match="the coordinator at"):
        for _ in results:
            pass
    assert time.monotonic() - began < 10.0
    with pytest.raises(gradwire.Unreachable):
        trainer.step(*make_batches(8)[0])


def test_an_error_inside_the_block_ends_the_processes_and_keeps_the_logs() -> None:
    started: list[gradwire.LocalCluster] = []

    def fail_inside() -> None:
        with gradwire.local(stage_servers=1) as cluster:
            started.append(cluster)
            children.extend(psutil.Process(number) for number in cluster.process_ids)
            raise ZeroDivisionError

    children: list[psutil.Process] = []
    with pytest.raises(ZeroDivisionError) as caught:
        fail_inside()
    logs = started[0].log_dir
    assert len(children) == 2
    assert not any(child.is_running() for child in children)
    assert str(logs) in "".join(caught.value.__notes__)
    assert (logs / "coordinator.log").exists()
    shutil.rmtree(logs.parent)


PARENT = """
import gradwire, os, time
with gradwire.local(stage_servers=1) as cluster:
    print(*cluster.process_ids, flush=True)
    time.sleep(600)
"""


def test_kill_9_of_the_parent_leaves_no_process() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=12)
    assert not alive
