"""A whole cluster over mutual TLS, as processes: equal to plaintext bit for bit, through rotations too."""

from __future__ import annotations

import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradwire
from gradwire.certs.authority import Authority
from gradwire.certs.members import issue, members_of, reissue
from gradwire.service_process import Addresses, ServiceProcess, end_all
from gradwire_protocol.roles import Role
from gradwire_protocol.tls_files import TlsFiles

STEPS = 8


class TlsCluster:
    """A coordinator and two stage servers with certificates of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority")
        self.client = self.issue(Role.CLIENT, "client")
        self.processes: list[ServiceProcess] = []
        self.coordinator = self.start("coordinator", Role.COORDINATOR, "--state-dir", str(folder / "state"))
        joining = ("--coordinator", self.coordinator.address, "--no-shared-memory")
        self.stages = [self.start(f"stage-{number}", Role.STAGE, *joining) for number in range(2)]

    def issue(self, role: Role, name: str, *addresses: str) -> TlsFiles:
        return issue(self.authority, role=role, name=name, addresses=addresses)

    def start(self, name: str, role: Role, *arguments: str) -> Addresses:
        module = "gradwire_coordinator" if role is Role.COORDINATOR else "gradwire_stage"
        files = self.issue(role, name, "127.0.0.1")
        flags = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *arguments]
        for kind in ("authority", "certificate", "key"):
            flags += [f"--tls-{kind}", str(getattr(files, kind))]
        process = ServiceProcess(name, module, flags, self.folder / f"{name}.log")
        self.processes.append(process)
        return process.wait_ready(time.monotonic() + 60)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def rotate(self, *, authority: bool = False) -> None:
        if authority:
            self.authority = self.authority.renewed()
        for member in members_of(self.authority.directory):
            reissue(self.authority, member)

    @contextmanager
    def connect(self) -> Iterator[gradwire.Cluster]:
        with gradwire.connect(self.coordinator.address, self.client) as cluster:
            deadline = time.monotonic() + 60
            while len(cluster.status().servers) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            yield cluster


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsCluster]:
    made = TlsCluster(tmp_path_factory.mktemp("secure"))
    try:
        yield made
    finally:
        end_all(made.processes[1:], 5.0)
        end_all(made.processes[:1], 5.0)


def train(cluster: gradwire.Cluster, steps: int = STEPS, between: object = None) -> tuple[list[float], dict]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(16, 8, dtype=torch.float64)
    y = x[:, :4].argmax(dim=1)
    plan = gradwire.Plan(stages=2, microbatches=4, cuts=["2"], schedule="1f1b")
    losses = []
    with cluster.trainer(model, optimizer, loss=F.cross_entropy, example=(x, y), plan=plan) as trainer:
        for result in trainer.run([(x, y)], steps=steps):
            losses.append(result.loss)
            if callable(between):
                between(result.step)
        return losses, trainer.state_dict()


def test_training_over_tls_equals_plaintext_bit_for_bit(secure: TlsCluster) -> None:
    with gradwire.local(stage_servers=2) as plain:
        expected_losses, expected = train(plain)
    with secure.connect() as cluster:
        losses, weights = train(cluster)
    assert losses == expected_losses
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_rotation_under_load_loses_no_step(secure: TlsCluster) -> None:
    """Every certificate is replaced again and again, the authority's too, while steps go on and runs come and go."""
    ended, rotations = threading.Event(), []

    def rotate() -> None:
        while not ended.is_set():
            secure.rotate(authority=len(rotations) == 2)
            rotations.append(time.monotonic())
            ended.wait(0.2)

    with secure.connect() as cluster:
        expected, _ = train(cluster, steps=40)
        thread = threading.Thread(target=rotate)
        thread.start()
        try:
            for _ in range(3):
                losses, _ = train(cluster, steps=40, between=lambda step: time.sleep(0.01))
                assert losses == expected
        finally:
            ended.set()
            thread.join()
        assert len(rotations) > 4
        time.sleep(1.5)
        servers = cluster.status().servers
        assert len(servers) == 2
        assert all(server.silent_seconds < 5 for server in servers)
        log = secure.log("coordinator")
        assert "server lost" not in log
        assert log.count("server registered") == 2
    for name, addresses in (("coordinator", secure.coordinator), ("stage-0", secure.stages[0])):
        host, _, port = addresses.address.partition(":")
        shown = ssl.get_server_certificate((host, int(port)), timeout=10)
        assert (secure.authority.directory / name / "certificate.pem").read_text().startswith(shown)


def test_every_service_says_when_its_certificate_ends(secure: TlsCluster) -> None:
    for name, addresses in zip(
        ("coordinator", "stage-0", "stage-1"), (secure.coordinator, *secure.stages), strict=True
    ):
        with urllib.request.urlopen(f"http://{addresses.metrics_address}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        metric = "gradwire_certificate_expiry_timestamp_seconds "
        value = float(next(line.removeprefix(metric) for line in lines if line.startswith(metric)))
        info = next(member.info for member in members_of(secure.authority.directory) if member.info.name == name)
        assert value == info.not_after.timestamp()


@pytest.mark.parametrize("role", [Role.STAGE, Role.PARAMETER, Role.COORDINATOR])
def test_only_a_client_drives_a_cluster(secure: TlsCluster, role: Role) -> None:
    files = secure.issue(role, f"pretending-{role}", "127.0.0.1")
    with pytest.raises(gradwire.NotAllowed, match="GetStatus") as caught:
        gradwire.connect(secure.coordinator.address, files)
    assert "client" in caught.value.expected
    assert str(role) in caught.value.got


def test_a_server_with_somebody_elses_address_is_not_taken(secure: TlsCluster) -> None:
    before = secure.log("coordinator").count("server registered")
    joining = ("--coordinator", secure.coordinator.address, "--advertise", "127.0.0.2:7000")
    secure.start("liar", Role.STAGE, *joining)
    deadline = time.monotonic() + 30
    while "advertises an address" not in secure.log("liar") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "advertises an address" in secure.log("liar")
    assert secure.log("coordinator").count("server registered") == before
    end_all([secure.processes.pop()], 5.0)


def test_a_stage_server_of_the_wrong_role_does_not_start(secure: TlsCluster) -> None:
    with pytest.raises(gradwire.SettingsError, match="not one for this service"):
        secure.start("wrong", Role.STAGE, "--role", "parameter", "--coordinator", secure.coordinator.address)
    end_all([secure.processes.pop()], 5.0)
