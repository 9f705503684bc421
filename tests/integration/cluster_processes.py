"""The processes of a local cluster's servers: to find, to stop in the midst of a run, and to see free again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

import gradwire


def process_of(cluster: gradwire.LocalCluster, name: str) -> psutil.Process:
    """The process of a server, by the port that it listens on."""
    (address,) = [server.address for server in cluster.status().servers if server.server == name]
    port = int(address.rpartition(":")[2])
    (found,) = [
        process
        for process in map(psutil.Process, cluster.process_ids)
        if any(item.laddr.port == port and item.status == psutil.CONN_LISTEN for item in process.net_connections())
    ]
    return found


def wait_until_free(cluster: gradwire.Cluster, *, but: str = "") -> None:
    """Wait until no server holds a run any more, but for one that cannot say so."""
    deadline = time.monotonic() + 15
    while held := [each.server for each in cluster.status().servers if each.activity.run and each.server != but]:
        assert time.monotonic() < deadline, f"{held} are not free again"
        time.sleep(0.1)


def failure(trainer: gradwire.Trainer, batch: Any, stop: Callable[[], None]) -> gradwire.GradwireError:
    """What a run ends with that is stopped in the midst of its steps; whoever asks later gets the same."""
    results = trainer.run([batch], steps=100_000, progress=False)
    next(results)
    stop()
    began = time.monotonic()
    with pytest.raises(gradwire.GradwireError) as caught:
        for _ in results:
            pass
    assert time.monotonic() - began < 15
    with pytest.raises(type(caught.value)):
        trainer.step(*batch)
    return caught.value
