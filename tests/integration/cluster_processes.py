"""The processes of a local cluster's servers, and when its servers are free again."""

from __future__ import annotations

import time

import psutil

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


def wait_until_free(cluster: gradwire.LocalCluster, *, but: str = "") -> None:
    """Wait until no server holds a run any more, but for one that cannot say so."""
    deadline = time.monotonic() + 15
    while held := [each.server for each in cluster.status().servers if each.activity.run and each.server != but]:
        assert time.monotonic() < deadline, f"{held} are not free again"
        time.sleep(0.1)
