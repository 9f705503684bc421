"""SIGKILL of either side of shared memory, at any moment: nothing is left of it, and the survivor is as before."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_child import PAYLOAD, SLOT_BYTES, SLOTS
from torch import nn

import gradwire
from gradwire.service_process import ServiceProcess, end_all
from gradwire_protocol.handover import Directory, Handover, take_over
from gradwire_protocol.shared_block import BlockError, OwnBlock, PeerBlock

pytestmark = pytest.mark.fault

CHILD = Path(__file__).with_name("memory_child.py")
MAPPING = re.compile(r"\S+ \S+ \S+ \S+ (\d+) +/memfd:gradwire")


def blocks_of(process: int | str) -> set[int]:
    """Return the inodes of blocks that a process has mapped or open; empty if it is gone."""
    found: set[int] = set()
    root = Path(f"/proc/{process}")
    with contextlib.suppress(OSError):
        found.update(map(int, MAPPING.findall((root / "maps").read_text())))
    with contextlib.suppress(OSError):
        for entry in os.listdir(root / "fd"):
            with contextlib.suppress(OSError):
                if "memfd:gradwire" in os.readlink(root / "fd" / entry):
                    found.add(os.stat(root / "fd" / entry).st_ino)
    return found


def users_of(blocks: set[int]) -> list[str]:
    """Return the processes of the whole machine that have any of these blocks. The kernel frees what nobody has."""
    return [name for name in os.listdir("/proc") if name.isdecimal() and blocks_of(name) & blocks]


def descriptors_of(process: int | str) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@contextlib.contextmanager
def child(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process at its moment, and the first that it said."""
    command = [sys.executable, str(CHILD), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> set[int]:
    """End a process with SIGKILL, and return the blocks that it had."""
    blocks = blocks_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return blocks


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """For sockets; in the end there is none, and this process has what it had before."""
    gc.collect()
    before = (blocks_of("self"), descriptors_of("self"), threading.active_count())
    yield tmp_path
    gc.collect()
    assert (blocks_of("self"), descriptors_of("self"), threading.active_count()) == before
    with Directory(tmp_path) as made:
        made.sweep()
        assert os.listdir(made.descriptor) == []


@pytest.mark.parametrize("moment", ["listening", "asked", "allocated"])
def test_a_sender_killed_before_it_has_given_the_block(directory: Path, moment: str) -> None:
    with child("sender", directory, moment) as (process, said):
        refusals: list[str] = []

        def take() -> None:
            try:
                take_over(directory, said["socket"], bytes.fromhex(said["ticket"]), 20)
            except BlockError as error:
                refusals.append(str(error))

        taker = threading.Thread(target=take)
        taker.start()
        time.sleep(0.3)
        blocks = kill(process)
        assert len(blocks) == (moment == "allocated")
        taker.join(5)
        assert ["not handed over" in text for text in refusals] == [True]
        assert not users_of(blocks)
        # The name is left, and is swept; until then nobody is misled by it.
        with pytest.raises(BlockError, match="cannot be reached"):
            take_over(directory, said["socket"], bytes.fromhex(said["ticket"]), 5)


@pytest.mark.parametrize("moment", ["given", "sent"])
def test_a_sender_killed_when_its_block_is_mapped(directory: Path, moment: str) -> None:
    with child("sender", directory, moment) as (process, said):
        ticket = bytes.fromhex(said["ticket"])
        block = PeerBlock(take_over(directory, said["socket"], ticket, 5), ticket, SLOTS, SLOT_BYTES)
        payload = None
        if moment == "sent":
            assert process.stdout is not None
            slot, use = json.loads(process.stdout.readline())["placed"]
            payload = block.take(slot, use, len(PAYLOAD))
        blocks = kill(process)
        assert len(blocks) == 1
        del block
        if payload is not None:
            # Payloads outlive their sender.
            assert users_of(blocks) == [str(os.getpid())]
            assert payload == PAYLOAD
            del payload
        assert not users_of(blocks)


@pytest.mark.parametrize("moment", ["before", "holding", "mapped", "reading"])
def test_a_receiver_killed(directory: Path, moment: str) -> None:
    block = OwnBlock(SLOTS, SLOT_BYTES)
    over = threading.Event()

    def give(block: OwnBlock) -> None:
        if handover.serve(block.ticket, block.allocate, over.is_set):
            assert block.put(memoryview(PAYLOAD)) == (0, 1)

    with Handover(directory) as handover:
        server = threading.Thread(target=give, args=(block,))
        server.start()
        arguments = (directory, handover.name, block.ticket.hex(), SLOTS, SLOT_BYTES, moment)
        with child("receiver", *arguments) as (process, _):
            blocks = kill(process)
            assert len(blocks) == (moment != "before")
        over.set()
        server.join()
    if moment != "before":
        assert users_of(blocks) == [str(os.getpid())]
        # The slot of the dead never comes back; the others are as they were.
        assert block.is_answered() == (moment in ("mapped", "reading"))
        assert block.put(memoryview(PAYLOAD)) is not None
    del block
    gc.collect()
    assert not users_of(blocks)


class Wide(nn.Module):
    """Activations of 512 KiB a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def train(cluster: gradwire.Cluster, stages: int = 2, steps: int = 3) -> None:
    torch.manual_seed(0)
    model = Wide()
    x = torch.randn(2048, 256)
    with cluster.trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=F.mse_loss,
        example=(x, x),
        plan=gradwire.Plan(stages=stages, microbatches=4),
    ) as trainer:
        for _ in range(steps):
            trainer.step(x, x)


class Pair:
    """A cluster of two stage servers, in the order in which runs take them; one may be killed and replaced."""

    def __init__(self, cluster: gradwire.LocalCluster, logs: Path) -> None:
        self.cluster = cluster
        self.servers = cluster.process_ids[1:]
        self.replacements: list[ServiceProcess] = []
        self._logs = logs

    def complete(self) -> None:
        """Start a server in the place of one that has been killed."""
        if len(self.servers) == 2:
            return
        flags = ["--coordinator", self.cluster.address, "--metrics-listen", ""]
        log = self._logs / f"{len(self.replacements)}.log"
        made = ServiceProcess("a server", "gradwire_stage", flags, log)
        self.replacements.append(made)
        made.wait_ready(time.monotonic() + 60)
        self.servers.append(made.process_id)
        # Until the lease of the dead one is over, if nothing has told the coordinator before.
        wait_until(lambda: len(self.cluster.status().servers) == 2, 30)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with gradwire.local(stage_servers=2) as cluster:
        made = Pair(cluster, tmp_path_factory.mktemp("logs"))
        try:
            yield made
        finally:
            end_all(made.replacements, 5)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("after_seconds", [0.0, 0.02, 0.25])
def test_a_stage_server_killed_in_training(pair: Pair, victim: int, after_seconds: float) -> None:
    """The run fails with an error that names it; the other server has nothing of the run, and goes on serving."""
    pair.complete()
    cluster, servers = pair.cluster, list(pair.servers)
    train(cluster)
    wait_until(lambda: not any(map(blocks_of, servers)))
    survivor = servers[1 - victim]
    before = descriptors_of(survivor)
    blocks: set[int] = set()

    def strike() -> None:
        # During the first step: as soon as the first block is there, or a moment later.
        wait_until(lambda: any(map(blocks_of, servers)), 30)
        time.sleep(after_seconds)
        for server in servers:
            blocks.update(blocks_of(server))
        os.kill(servers[victim], signal.SIGKILL)
        pair.servers.remove(servers[victim])

    striker = threading.Thread(target=strike)
    striker.start()
    with pytest.raises((gradwire.StageFailed, gradwire.Unreachable)):
        train(cluster, steps=100_000)
    striker.join()
    assert blocks
    wait_until(lambda: not blocks_of(survivor))
    assert not users_of(blocks)
    wait_until(lambda: descriptors_of(survivor) <= before)
    train(cluster, stages=1)
