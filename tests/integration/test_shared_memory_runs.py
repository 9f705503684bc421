"""Runs whose servers share memory: the same numbers as without it, and plain gRPC wherever it cannot be."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from prometheus_pages import Page, scrape, scrape_settled, total
from torch import nn

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from gradwire.service_process import ServiceProcess, end_all

LOCAL = "127.0.0.1:0"
# Activations of (rows × 64 × 64 × 8) bytes, and a tied embedding of 128 KiB: a gradient exchange, too small by default.
SHAPE = Shape(layers=2, width=64, heads=2, context=64)
# Rows of a batch: micro-batches of 256 KiB and more, of several sizes, and smaller ones.
BATCH_ROWS = (64, 37, 100, 5, 64)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return GPT(SHAPE).double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, 256, (rows, SHAPE.context + 1), generator=torch.Generator().manual_seed(rows))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


Outcome = tuple[list[float], dict[str, torch.Tensor]]


def one_process() -> Outcome:
    model = make_model()
    optimizer = make_optimizer(model)
    losses = []
    for rows in BATCH_ROWS:
        x, y = batch(rows)
        optimizer.zero_grad()
        loss = 0.0
        for part_x, part_y in zip(x.tensor_split(4), y.tensor_split(4), strict=True):
            value = next_byte_loss(model(part_x), part_y) * (len(part_x) / rows)
            value.backward()
            loss += value.item()
        optimizer.step()
        losses.append(loss)
    return losses, model.state_dict()


def on_cluster(cluster: gradwire.Cluster) -> tuple[Outcome, list[Page]]:
    """Return losses, final weights, and what Prometheus reads of the servers in the end."""
    model = make_model()
    with cluster.trainer(
        model,
        make_optimizer(model),
        loss=next_byte_loss,
        example=batch(BATCH_ROWS[0]),
        # Equal bits need equal cuts: measured costs may move them by a node from run to run.
        plan=gradwire.Plan(stages=2, microbatches=4, schedule="1f1b", cuts=["blocks.1"]),
    ) as trainer:
        losses = [trainer.step(*batch(rows)).loss for rows in BATCH_ROWS]
        weights = trainer.state_dict()
        addresses = [server.metrics_address for server in cluster.status().servers if server.server in trainer.servers]
        pages = scrape_settled(addresses, trainer.run_id)
    return (losses, weights), pages


def passed(pages: Sequence[Page]) -> list[float]:
    """Return the bytes that each server has sent through shared memory."""
    return [total(page, "gradwire_shared_memory_transfer_bytes_total") for page in pages]


def fallbacks(pages: Sequence[Page]) -> dict[str, float]:
    """Return how often each reason was counted, on all servers, of those that were."""
    counted: dict[str, float] = {}
    for page in pages:
        for (name, labels), value in page.items():
            if name == "gradwire_shared_memory_fallbacks_total" and value:
                reason = dict(labels)["reason"]
                counted[reason] = counted.get(reason, 0) + value
    return counted


def check_same(made: Outcome, other: Outcome) -> None:
    assert made[0] == other[0]
    assert made[1].keys() == other[1].keys()
    assert all(torch.equal(made[1][name], other[1][name]) for name in other[1])


@pytest.fixture(scope="module")
def without() -> Outcome:
    """A run whose payloads all go over gRPC; near one process, which sums in another order."""
    with environment(GRADWIRE_STAGE_SHARED_MEMORY="0"), gradwire.local(stage_servers=2) as cluster:
        outcome, pages = on_cluster(cluster)
    assert passed(pages) == [0, 0]
    assert fallbacks(pages) == {}
    losses, weights = one_process()
    assert outcome[0] == pytest.approx(losses, rel=1e-10)
    for name, weight in weights.items():
        torch.testing.assert_close(outcome[1][name], weight, rtol=1e-8, atol=1e-10)
    return outcome


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def test_a_run_through_memory_gives_the_same_bits(without: Outcome, four_processes: gradwire.Cluster) -> None:
    def fallbacks_of_all() -> dict[str, float]:
        return fallbacks([scrape(server.metrics_address) for server in four_processes.status().servers])

    before = fallbacks_of_all()
    for _ in range(2):  # a new run makes new blocks
        outcome, pages = on_cluster(four_processes)
        check_same(outcome, without)
        large = sum(
            part * SHAPE.context * SHAPE.width * 8
            for rows in BATCH_ROWS
            for part in (len(x) for x in torch.empty(rows).tensor_split(4))
            if part * SHAPE.context * SHAPE.width * 8 >= 256 * 2**10
        )
        assert passed(pages) == [large, large]
        assert fallbacks_of_all() == before
        assert all(total(page, "gradwire_shared_memory_bytes") > 0 for page in pages)
        wait_until_given_back(four_processes)


def wait_until_given_back(cluster: gradwire.Cluster) -> None:
    """Until no server has blocks. What heartbeats say of a run can be a second old: the servers' own metrics count."""
    deadline = time.monotonic() + 10
    pages = [server.metrics_address for server in cluster.status().servers]
    while any(total(scrape(page), "gradwire_shared_memory_bytes") for page in pages):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_everything_may_go_through_memory_gradient_exchange_included(without: Outcome) -> None:
    with environment(GRADWIRE_STAGE_SHARED_MEMORY_THRESHOLD_BYTES="1"), gradwire.local(stage_servers=2) as cluster:
        outcome, pages = on_cluster(cluster)
    check_same(outcome, without)
    for page, by_memory in zip(pages, passed(pages), strict=True):
        to_peers = total(page, "gradwire_transfer_bytes_total", direction="sent")
        to_client = total(page, "gradwire_transfer_bytes_total", direction="sent", peer="client")
        assert by_memory == to_peers - to_client
    assert fallbacks(pages) == {}


def test_with_too_little_memory_some_payloads_take_the_other_way(without: Outcome) -> None:
    """One slot of the usual size: while its payload is needed, others go over gRPC."""
    with environment(GRADWIRE_STAGE_SHARED_MEMORY_BYTES=str(600 * 2**10)), gradwire.local(stage_servers=2) as cluster:
        outcome, pages = on_cluster(cluster)
    check_same(outcome, without)
    assert fallbacks(pages).keys() == {"no-slot"}
    assert all(size > 0 for size in passed(pages))
    assert all(total(page, "gradwire_shared_memory_bytes") <= 600 * 2**10 for page in pages)


class Servers:
    """A coordinator, and stage servers that are each started within namespaces of their own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[ServiceProcess] = []
        arguments = ["--listen", LOCAL, "--metrics-listen", LOCAL, "--state-dir", str(directory / "state")]
        self._start("coordinator", "gradwire_coordinator", arguments)
        self.address = self._processes[0].wait_ready(time.monotonic() + 60).address

    def _start(self, name: str, module: str, arguments: list[str]) -> None:
        self._processes.append(ServiceProcess(name, module, arguments, self._directory / f"{name}.log"))

    def add(self, name: str, *arguments: str, within: Sequence[str] = (), setup: str = ":") -> None:
        """Start a stage server by `within` (such as unshare and its flags), after a shell has run `setup`."""
        flags = ["--coordinator", self.address, "--listen", LOCAL, "--metrics-listen", LOCAL, "--server", name]
        with pytest.MonkeyPatch.context() as patch:
            wrapper = self._directory / f"{name}.sh"
            inner = f'{setup} && exec "{sys.executable}" "$@"'
            wrapper.write_text(f"#!/bin/sh\nexec {' '.join(within)} sh -c '{inner}' sh \"$@\"\n")
            wrapper.chmod(0o755)
            patch.setattr("gradwire.service_process.sys.executable", str(wrapper))
            self._start(name, "gradwire_stage", [*flags, *arguments])

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text()

    def end(self) -> None:
        end_all(self._processes[1:], 5)
        end_all(self._processes[:1], 5)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path)
    try:
        yield made
    finally:
        made.end()


def run_on(servers: Servers, without: Outcome) -> list[Mapping[tuple[str, frozenset[tuple[str, str]]], float]]:
    with gradwire.connect(servers.address) as cluster:
        deadline = time.monotonic() + 60
        while len(cluster.status().servers) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        outcome, pages = on_cluster(cluster)
    check_same(outcome, without)
    return pages


def can_unshare() -> bool:
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "true"], capture_output=True
        ).returncode
    )


# To each peer: activations and their gradients on one, what replicas and tied copies exchange on the other.
STREAMS = 2
namespaces = pytest.mark.skipif(not can_unshare(), reason="may not make namespaces here")
# What containers have of their own; they share the network here, so that there is one loopback.
CONTAINER = ("unshare", "--mount", "--propagation", "private", "--ipc", "--uts", "--pid", "--fork", "--kill-child")
OWN_PROC = "mount -t proc proc /proc && hostname same"


@namespaces
def test_containers_that_see_different_files_use_grpc_and_say_why(servers: Servers, without: Outcome) -> None:
    """Same kernel, same host name, same path: but what lies under it is not the same."""
    for name in ("a", "b"):
        servers.add(name, within=CONTAINER, setup=f"{OWN_PROC} && mount -t tmpfs tmpfs /tmp")
    pages = run_on(servers, without)
    assert passed(pages) == [0, 0]
    assert fallbacks(pages) == {"other-host": 2 * STREAMS}
    for name in ("a", "b"):
        said = [line for line in servers.log(name).splitlines() if "payloads go over gRPC" in line]
        assert len(said) == STREAMS
        assert "another host, or another file system" in said[0]


@namespaces
def test_containers_that_share_a_volume_share_memory(servers: Servers, without: Outcome, tmp_path: Path) -> None:
    """Wherever each of them has mounted it."""
    volume = tmp_path / "volume"
    volume.mkdir()
    for name in ("a", "b"):
        mount = f"mount -t tmpfs tmpfs /mnt && mkdir /mnt/{name} && mount --bind {volume} /mnt/{name}"
        servers.add(name, "--shared-memory-directory", f"/mnt/{name}", within=CONTAINER, setup=f"{OWN_PROC} && {mount}")
    pages = run_on(servers, without)
    assert all(size > 0 for size in passed(pages))
    assert fallbacks(pages) == {}
    assert os.listdir(volume / f"gradwire-shared-{os.geteuid()}") == []


@namespaces
def test_a_container_with_a_user_namespace_of_its_own_shares_what_its_user_may(
    servers: Servers, without: Outcome, tmp_path: Path
) -> None:
    servers.add("a", "--shared-memory-directory", str(tmp_path))
    servers.add("b", "--shared-memory-directory", str(tmp_path), within=("unshare", "--user", "--map-root-user"))
    pages = run_on(servers, without)
    assert all(size > 0 for size in passed(pages))
    assert fallbacks(pages) == {}


def test_a_server_that_has_it_switched_off_gets_and_sends_chunks(servers: Servers, without: Outcome) -> None:
    servers.add("a")
    servers.add("b", "--no-shared-memory")
    pages = run_on(servers, without)
    assert passed(pages) == [0, 0]
    assert fallbacks(pages) == {"off": STREAMS}
