"""The Helm chart's pods, run: they find each other, let each other in, are healthy, and train to the end.

Commands, environment, probes and certificates are those that the chart renders; each pod has a network and a host name
of its own. Not tested here: the images (test_compose…), and that Kubernetes does what its documents ask for.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from network import NoNetwork
from pods import Node, RunningPod

import certificate_issuer
from gradwire.certs.authority import Authority
from helm_chart import CERT_MANAGER, NAMESPACE, Pod, Rendered, needs_helm, rendered

pytestmark = [pytest.mark.deploy, needs_helm, pytest.mark.timeout(400)]

STARTED_SECONDS = 150.0
SMALL = {"layers": 2, "width": 32, "heads": 2, "context": 32, "batch": 8, "microbatches": 4, "steps": 6}
VALUES = {
    **CERT_MANAGER,
    "coordinator": {"settings": {"profiling_seconds": 0.5}},
    "stage": {"replicas": 2},
    "parameter": {"replicas": 1},
    "checkpoints": {"enabled": True},
    "graceSeconds": 20,
    "trainer": {
        "enabled": True,
        "settings": {**SMALL, "evaluate_every": 3, "validation_windows": 8, "save_every": 2, "stall_seconds": 30},
    },
}


@dataclass(frozen=True)
class Cluster:
    """The release's pods; those of servers run."""

    chart: Rendered
    servers: list[RunningPod]
    client: RunningPod
    test: RunningPod
    log: Path
    processes: dict[str, subprocess.Popen[bytes]]


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STARTED_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("pods")
    chart = rendered(VALUES)
    authority = Authority.create(folder / "ca")
    secrets = {
        resource["spec"]["secretName"]: certificate_issuer.issue(resource, authority, folder / "secrets" / name)
        for resource in chart.of_kind("Certificate")
        for name in [resource["metadata"]["name"]]
    }
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    with ExitStack() as stack:
        try:
            node = stack.enter_context(Node.made(folder))
        except NoNetwork as error:
            pytest.skip(f"pods' networks cannot be made here: {error}")

        def add(pod: Pod, host_name: str, *names: str) -> RunningPod:
            (secret,) = [each["secret"]["secretName"] for each in pod.spec["volumes"] if each["name"] == "certs"]
            volumes = {"certs": secrets[secret], "checkpoints": checkpoints}
            return node.add(pod, host_name, names, volumes)

        def servers() -> Iterator[RunningPod]:
            coordinator = chart.pod("coordinator")
            service = coordinator.owner["metadata"]["name"]
            # A service's own address is not the pod's; here there is one pod behind it, and no other address.
            yield add(coordinator, f"{service}-6f9c-x2", service, f"{service}.{NAMESPACE}.svc")
            for component in ("stage", "parameter"):
                pod = chart.pod(component)
                domain = f"{pod.owner['spec']['serviceName']}.{NAMESPACE}.svc"
                for number in range(pod.owner["spec"]["replicas"]):
                    name = f"{pod.owner['metadata']['name']}-{number}"
                    yield add(pod, name, f"{name}.{domain}")

        (test,) = [pod for pod in chart.pods if pod.owner["kind"] == "Pod"]
        made = Cluster(
            chart, list(servers()), add(chart.pod("client"), "trainer"), add(test, "status"), folder / "log", {}
        )
        made.log.mkdir()
        for server in made.servers:
            made.processes[server.host_name] = stack.enter_context(server.running(made.log / f"{server.host_name}.log"))
        yield made


def logs(cluster: Cluster) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(cluster.log.iterdir()))


def probe(server: RunningPod) -> int:
    """Return what the probes' command ends with; it is one for all kinds."""
    return server.execute(server.pod.container["readinessProbe"]["exec"]["command"]).returncode


def said(cluster: Cluster, pod: RunningPod, command: Sequence[str]) -> str:
    ran = pod.execute(command)
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}\n{logs(cluster)}"
    return ran.stdout


def test_probes_say_that_each_serves(cluster: Cluster) -> None:
    for server in cluster.servers:
        eventually(lambda server=server: probe(server) == 0, f"{server.host_name}\n{logs(cluster)}")


def test_the_trainer_trains_to_the_end(cluster: Cluster) -> None:
    (train,) = cluster.client.pod.containers
    output = said(cluster, cluster.client, train["command"])
    assert "verdict: equal" in output, output
    run = cluster.client.folders["runs"] / "reference"
    assert (run / "weights.safetensors").exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-6"


def seen(cluster: Cluster) -> list[str]:
    """Return the addresses that `helm test` shows."""
    output = said(cluster, cluster.test, [*cluster.test.pod.container["command"], "--json"])
    return sorted(server["address"] for server in json.loads(output)["servers"])


def test_helm_test_sees_every_server(cluster: Cluster) -> None:
    addresses = [
        f"{each.host_name}.{each.host_name.rpartition('-')[0]}.{NAMESPACE}.svc:7080" for each in cluster.servers
    ]
    assert seen(cluster) == sorted(addresses[1:])


def test_a_pod_that_is_stopped_leaves_in_time_and_is_not_ready(cluster: Cluster) -> None:
    server = cluster.servers[2]
    process = cluster.processes[server.host_name]
    process.terminate()
    assert process.wait(server.pod.spec["terminationGracePeriodSeconds"]) == 0, logs(cluster)
    assert probe(server) == 1
    assert not any(address.startswith(server.host_name) for address in seen(cluster))
