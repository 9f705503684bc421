"""Builds the images, and runs the compose file, in a real Docker engine (make test-docker).

The tests of this file are one story, in this order: up, train, look, grow, lose a server, stop, down. Where images
cannot be pulled, stand-ins are used (docker_stand_ins.py), and Grafana is left out.
"""

from __future__ import annotations

import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compose_cluster import ComposeCluster

from dashboard_queries import ask, load, panel_queries, shown
from docker_engine import Docker

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]
STAGE_SERVERS = 4
SHORT = ("--steps=6", "--evaluate-every=6", "--validation-windows=16", "--warmup-steps=2")


@pytest.fixture(scope="module")
def cluster(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeCluster]:
    made = ComposeCluster(docker, tmp_path_factory.mktemp("compose"))
    made("--profile=*", "down", "--volumes", "--timeout=5")
    try:
        made("up", "--detach", "--wait", "--wait-timeout=240", "--quiet-pull", timeout=900)
        yield made
    except AssertionError:
        print(made("logs", "--no-color", "--tail=40", check=False))
        raise
    finally:
        made("--profile=*", "down", "--volumes")


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.5)


# --- up


def test_everything_is_up_and_healthy(cluster: ComposeCluster) -> None:
    healthy = {"coordinator": 1, "stage-server": STAGE_SERVERS, "parameter-server": 1, "prometheus": 1}
    for service, number in healthy.items():
        found = cluster.containers(service)
        assert len(found) == number
        assert {each["State"]["Health"]["Status"] for each in found} == {"healthy"}, service
    (once,) = cluster.containers("certificates")
    assert (once["State"]["Status"], once["State"]["ExitCode"]) == ("exited", 0)
    roles = [server["role"] for server in cluster.status()["servers"]]
    assert sorted(roles) == ["SERVER_ROLE_PARAMETER"] + ["SERVER_ROLE_STAGE"] * STAGE_SERVERS


def test_containers_can_do_little(cluster: ComposeCluster) -> None:
    for container in cluster.containers():
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"], container["Name"]
        assert host["CapDrop"] == ["ALL"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
        if not container["Config"]["Image"].startswith("gradwire/"):
            continue
        assert container["Config"]["User"] == "10001:10001"
    with pytest.raises(AssertionError, match="Read-only file system"):
        cluster("exec", "-T", "stage-server", "touch", "/opt/gradwire/mark")


def test_only_documented_ports_are_open_and_on_loopback(cluster: ComposeCluster) -> None:
    open_ports = {
        (service, port, binding["HostIp"])
        for container in cluster.containers()
        for service in [container["Config"]["Labels"]["com.docker.compose.service"]]
        for port, bindings in container["NetworkSettings"]["Ports"].items()
        for binding in bindings or ()
    }
    expected = {("prometheus", "9090/tcp", "127.0.0.1")}
    assert open_ports == (expected | {("grafana", "3000/tcp", "127.0.0.1")} if cluster.docker.pulls else expected)


def test_each_service_sees_its_own_certificate_and_nobody_the_authoritys_key(cluster: ComposeCluster) -> None:
    look = (
        "import os, pathlib; from gradwire_protocol.certificates import CertificateInfo, read_certificates as read; "
        "print(CertificateInfo.of(read(pathlib.Path('/certs/certificate.pem').read_bytes(), '')[0]).role, "
        "*[folder for folder, _, files in os.walk('/') if 'authority.key' in files])"
    )
    expected = {
        "coordinator": "coordinator",
        "stage-server": "stage",
        "parameter-server": "parameter",
        "trainer": "client",
    }
    for service, role in expected.items():
        assert cluster.run_python(service, "-c", look).strip() == role
    mounting = {
        container["Config"]["Labels"]["com.docker.compose.service"]
        for container in cluster.containers()
        for mount in container["Mounts"]
        if mount["Destination"] == "/authority"
    }
    assert mounting == {"certificates"}


def test_a_second_start_keeps_the_certificates(cluster: ComposeCluster) -> None:
    before = [each["Id"] for each in cluster.containers("coordinator", "stage-server")]
    cluster("up", "--detach", "--wait")
    said = cluster("logs", "--no-color", "--no-log-prefix", "certificates").splitlines()
    roles = ("coordinator", "stage", "parameter", "client")
    assert said[:5] == ["authority: made", *(f"{role}: issued" for role in roles)]
    assert said[-5:] == ["authority: kept", *(f"{role}: kept" for role in roles)]
    assert [each["Id"] for each in cluster.containers("coordinator", "stage-server")] == before


# --- train, and look


def test_the_reference_job_trains_to_its_end(cluster: ComposeCluster) -> None:
    """On four stages; exit code 0 means, too, that it equals one process."""
    *steps, summary = cluster.train(*SHORT, "--stages=4", "--replicas=1", "--exchange=ring", "--out=/runs/first")
    assert [each["step"] for each in steps if "loss" in each][-1] == 6
    assert summary["verdict"] == "equal"
    look = "import pathlib; print(*sorted(p.name for p in pathlib.Path('/runs/first').iterdir()))"
    files = cluster.run_python("trainer", "-c", look).split()
    assert {"metrics.jsonl", "plan.json", "report.txt", "weights.safetensors"} <= set(files)


def test_the_reference_job_trains_with_the_parameter_server(cluster: ComposeCluster) -> None:
    """As compose.parameter-server.yaml has it."""
    *_, summary = cluster.train(*SHORT, "--no-check")
    assert math.isfinite(summary["validation_loss"])


def test_prometheus_sees_every_service(cluster: ComposeCluster) -> None:
    url = f"http://{cluster.address('prometheus', 9090)}"

    def up() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for target in cluster.docker.inside(lambda: ask(url, "targets"))["activeTargets"]:
            found.setdefault(target["labels"]["job"], []).append(target["health"])
        return found

    expected = {
        "gradwire-coordinator": ["up"],
        "gradwire-stage-server": ["up"] * STAGE_SERVERS,
        "gradwire-parameter-server": ["up"],
        "prometheus": ["up"],
    }
    until(lambda: up() == expected, 60, f"{expected}; there is {up()}")
    groups = cluster.docker.inside(lambda: ask(url, "rules"))["groups"]
    assert [rule for group in groups for rule in group["rules"] if rule["health"] != "ok"] == []


def test_every_dashboard_query_returns_data(cluster: ComposeCluster) -> None:
    url = f"http://{cluster.address('prometheus', 9090)}"
    began = time.time()
    said = cluster.run_script(Path(__file__).with_name("compose_subject.py"), "20")
    assert said.count("trained") == 2
    ended = time.time()

    def without_data() -> list[str]:
        return [
            str(query)
            for query in panel_queries()
            if not any(math.isfinite(value) for _, values in shown(url, query, began, ended) for value in values)
        ]

    assert cluster.docker.inside(without_data) == []


def test_grafana_shows_the_dashboards_to_everybody_and_lets_nobody_in(cluster: ComposeCluster) -> None:
    if not cluster.docker.pulls:
        pytest.skip("Grafana's image cannot be pulled here, and there is no other")
    url = f"http://{cluster.address('grafana', 3000)}"

    def get(path: str) -> Any:
        with urllib.request.urlopen(url + path, timeout=30) as reply:
            return json.load(reply)

    committed = {each["title"] for each in load().values()}
    assert {each["title"] for each in get("/api/search?type=dash-db")} == committed
    known = json.dumps({"user": "admin", "password": "admin"}).encode()
    login = urllib.request.Request(f"{url}/login", known, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match=r"40\d"):
        urllib.request.urlopen(login, timeout=30)


# --- grow, lose a server, stop


def test_more_servers_are_there_for_the_next_plan(cluster: ComposeCluster) -> None:
    cluster("up", "--detach", "--wait", "--no-recreate", f"--scale=stage-server={STAGE_SERVERS + 1}")
    servers = [each for each in cluster.status()["servers"] if each["role"] == "SERVER_ROLE_STAGE"]
    assert len(servers) == STAGE_SERVERS + 1
    *_, summary = cluster.train(
        *SHORT, "--no-check", "--layers=5", f"--stages={STAGE_SERVERS + 1}", "--replicas=1", "--exchange=ring"
    )
    assert math.isfinite(summary["validation_loss"])


def test_a_run_survives_the_loss_of_a_stage_container(cluster: ComposeCluster, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    few = ("--evaluate-every=150", "--validation-windows=16", "--no-check")
    flags = ("--steps=150", "--save-every=5", "--stages=4", "--replicas=1", "--exchange=ring", *few)
    with cluster.start_training(log, *flags) as training:
        # The second line comes five seconds after the first one.
        until(lambda: training.poll() is not None or log.read_text().count("\nstep ") >= 2, 180, "some steps")
        assert training.poll() is None, log.read_text()
        busy = [each for each in cluster.status()["servers"] if each.get("activity", {}).get("run")]
        (lost,) = [each for each in busy if each["activity"]["stages"] == [2]]
        # A container's identifier begins with its host name.
        host = lost["address"].split(".")[0]
        cluster.docker("kill", host)
        code = training.wait(timeout=400)
    said = log.read_text()
    assert code == 0, said
    assert f"{host}.gradwire-test:7080) was lost" in said
    assert re.search(r"going on after step \d+", said), said
    assert "validation loss" in said
    (container,) = [each for each in cluster.containers("stage-server") if each["Id"].startswith(host)]
    assert container["State"]["ExitCode"] == 137


def test_containers_stop_in_good_order(cluster: ComposeCluster) -> None:
    """Within the time that they have for it, with 0."""
    running = [each["Id"] for each in cluster.containers() if each["State"]["Running"]]
    cluster("stop")
    ends = {each["Name"]: each["State"]["ExitCode"] for each in json.loads(cluster.docker("inspect", *running))}
    assert len(ends) >= STAGE_SERVERS + 3
    assert set(ends.values()) == {0}, ends


def test_started_again_it_knows_its_runs(cluster: ComposeCluster) -> None:
    cluster("up", "--detach", "--wait", "--no-recreate")
    # The job's on both layouts, those of the script, the one that lost a server, and the checks with one process.
    assert len(cluster.status()["runs"]) >= 6


def test_down_leaves_nothing(cluster: ComposeCluster) -> None:
    assert set(cluster.left()) == {"containers", "networks", "volumes"}
    cluster("--profile=*", "down", "--volumes")
    assert cluster.left() == {}
