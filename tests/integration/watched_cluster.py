"""A cluster over TLS with a parameter server, and a real Prometheus that watches it by the committed configuration."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

import gradwire
from dashboard_queries import ask
from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire.service_process import Addresses, ServiceProcess, end_all
from gradwire_protocol.roles import Role
from prometheus_tools import ALERTS, CONFIGURATION, program

# The committed configuration waits longer.
SCRAPE_SECONDS = 1
# Longer than tests freeze a server.
LEASE_SECONDS = 30


class WatchedCluster:
    """The coordinator's process, those of servers, and where Prometheus answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "checkpoints").mkdir()
        self._authority = Authority.create(folder / "authority")
        self._client = issue(self._authority, role=Role.CLIENT, name="client")
        self.processes: dict[str, ServiceProcess] = {}
        self.metrics: dict[str, str] = {}
        self._coordinator = ""
        self.prometheus = ""

    def start(self) -> None:
        leases = ("--lease-seconds", str(LEASE_SECONDS), "--heartbeat-seconds", "0.25", "--profiling-seconds", "0")
        state = ("--state-dir", str(self._folder / "state"))
        self._start("coordinator", Role.COORDINATOR, *leases, *state)
        self._coordinator = self._ready("coordinator").address
        servers = [f"stage-{number}" for number in range(4)]
        for name in servers:
            self._start(name, Role.STAGE)
        self._start("parameter", Role.PARAMETER, "--role", "parameter")
        for name in (*servers, "parameter"):
            self._ready(name)

    def end(self) -> None:
        coordinator, *servers = self.processes.values()
        end_all(servers, 5.0)
        end_all([coordinator], 5.0)

    def _start(self, name: str, role: Role, *arguments: str) -> None:
        files = issue(self._authority, role=role, name=name, addresses=["127.0.0.1"])
        flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *arguments]
        flags += ["--checkpoint-root", str(self._folder / "checkpoints")]
        module = "gradwire_coordinator"
        if role is not Role.COORDINATOR:
            module = "gradwire_stage"
            flags += ["--coordinator", self._coordinator, "--server", name, "--threads", "1"]
        for kind in ("authority", "certificate", "key"):
            flags += [f"--tls-{kind}", str(getattr(files, kind))]
        self.processes[name] = ServiceProcess(name, module, flags, self._folder / f"{name}.log")

    def _ready(self, name: str) -> Addresses:
        ready = self.processes[name].wait_ready(time.monotonic() + 60)
        self.metrics[name] = ready.metrics_address
        return ready

    @contextmanager
    def connect(self) -> Iterator[gradwire.Cluster]:
        with gradwire.connect(self._coordinator, self._client) as cluster:
            deadline = time.monotonic() + 60
            while len(cluster.status().servers) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield cluster

    def wait_until(self, expression: str, seconds: float = 30.0) -> list[dict[str, Any]]:
        """Wait until Prometheus finds something; return it."""
        deadline = time.monotonic() + seconds
        while not (found := ask(self.prometheus, "query", query=expression)["result"]):
            assert time.monotonic() < deadline, f"still nothing for {expression}"
            time.sleep(0.2)
        return list(found)


def _configuration(metrics: dict[str, str]) -> str:
    """The committed configuration, quicker, with a local cluster's targets in the place of names."""
    made = yaml.safe_load(CONFIGURATION.read_text())
    made["global"] = dict.fromkeys(made["global"], f"{SCRAPE_SECONDS}s")
    made["rule_files"] = [str(ALERTS)]
    # Of what is no program of ours there is only Prometheus itself.
    made["scrape_configs"] = [job for job in made["scrape_configs"] if job["job_name"] != "dcgm-exporter"]
    jobs = {job["job_name"]: job for job in made["scrape_configs"]}
    for job in jobs.values():
        role = job["job_name"].removeprefix("gradwire-").removesuffix("-server")
        targets = [address for name, address in metrics.items() if name.startswith(role)]
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": targets}]
    assert all(job["static_configs"][0]["targets"] for job in jobs.values() if job["job_name"] != "prometheus")
    return str(yaml.safe_dump(made))


@contextmanager
def _prometheus(folder: Path, metrics: dict[str, str]) -> Iterator[str]:
    """Run Prometheus on a free port of the loopback; gives its URL."""
    (folder / "prometheus.yml").write_text(_configuration(metrics))
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 30
        while not (address := _ready_address(process.pid)):
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _ready_address(process_id: int) -> str:
    """The URL of a Prometheus that answers queries, empty before: at first it listens and answers 503 to them."""
    sockets = psutil.Process(process_id).net_connections("tcp")
    for port in [each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN]:
        with suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=10):
            return f"http://127.0.0.1:{port}"
    return ""


@contextmanager
def watched_cluster(folder: Path) -> Iterator[WatchedCluster]:
    """Four stage servers, a parameter server, their coordinator, and Prometheus, which has scraped them all."""
    made = WatchedCluster(folder)
    program("prometheus")
    with ExitStack() as stack:
        stack.callback(made.end)
        made.start()
        made.prometheus = stack.enter_context(_prometheus(folder, made.metrics))
        made.wait_until(f'count(up{{job=~"gradwire-.+"}} == 1) == {len(made.metrics)}')
        yield made
