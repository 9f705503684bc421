"""A day's messages in minutes: does anything grow? Many small ones first, then large ones, through two stage servers.

Resident memory, threads and file descriptors of every process, this one included, are read between steps, when nothing
is on its way. Growth is what a process has in the last fifth of its steps, as the median, over the most that it had in
the first fifth. A block of shared memory is a descriptor, too, as long as it is mapped; it is counted as a block.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

import gradwire
from report import Claim, add_arguments, finish

SMALL_MICRO_BATCHES = 32
LARGE_MICRO_BATCHES = 8
SAMPLES = 50
# What an allocator may keep of freed memory, whatever the number of messages: of large ones, those of a step's one
# direction. How many it keeps changes from step to step, in both directions.
NOISE_BYTES = {"small": 16 * 2**20, "large": LARGE_MICRO_BATCHES * 16 * 2**20}
# Slots for payloads double whenever all are taken, until there are some for every message on its way: twice eight.
SHARED_BYTES = {"small": 16 * 2**20, "large": 2 * LARGE_MICRO_BATCHES * 16 * 2**20}
# Each doubling is one block more, at both of its ends: from 4 slots to 16 in two, in either direction.
MORE_BLOCKS = {"small": 0, "large": 4}
# Workers that a thread pool starts when two calls happen to come at once; a leak shows by the thousand.
POOL_THREADS = 4


class Rest(nn.Module):
    """What the second server does: hardly anything."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, wide: torch.Tensor) -> torch.Tensor:
        return (wide * self.scale).mean(dim=1)


class Wide(nn.Module):
    """Few weights and a boundary of `width` values a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, width, bias=False)
        self.rest = Rest()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow: torch.Tensor = self.rest(self.first(x))  # (rows, width) between the two
        return narrow


@dataclass(frozen=True)
class Held:
    """What one process has at one moment."""

    # Of its own, and shared with other processes: code, and payloads on their way.
    resident_bytes: int
    shared_bytes: int
    threads: int
    blocks: int
    # Of files and sockets: other than blocks.
    descriptors: int


def opened(process: psutil.Process) -> tuple[int, int]:
    """Return how many blocks of shared memory a process has, and how many other descriptors."""
    targets = []
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            targets.append(os.readlink(descriptor))
        except FileNotFoundError:  # closed meanwhile
            continue
    blocks = sum(target.startswith("/memfd:") for target in targets)
    return blocks, len(targets) - blocks


def held(process: psutil.Process) -> Held:
    with process.oneshot():
        memory = process.memory_info()
        return Held(memory.rss - memory.shared, memory.shared, process.num_threads(), *opened(process))


def middle(samples: list[Held]) -> Held:
    """Return the median of each figure."""
    return Held(*(statistics.median_low(figures) for figures in zip(*map(astuple, samples), strict=True)))


def messages_between_servers(cluster: gradwire.LocalCluster) -> int:
    """Read from the servers' own metrics how many messages their peers have receipted."""
    total = 0.0
    for server in cluster.status().servers:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        total += sum(float(value) for value in re.findall(r"^gradwire_transfer_seconds_count\{.*\} (\S+)$", text, re.M))
    return int(total)


def steps(trainer: gradwire.Trainer, rows: int, count: int, processes: list[psutil.Process]) -> Iterator[list[Held]]:
    """Run `count` steps; yield what the processes hold, SAMPLES times."""
    x, y = torch.randn(rows, 4), torch.randn(rows)
    every = max(1, count // SAMPLES)
    left = count
    while left > 0:
        now = min(every, left)
        for _ in trainer.run([(x, y)] * now, progress=False):
            pass
        left -= now
        yield [held(process) for process in processes]


def soak(
    cluster: gradwire.LocalCluster, kind: str, *, width: int, rows: int, micro_batches: int, messages: int
) -> tuple[list[dict[str, object]], list[Claim]]:
    """Send at least `messages` in training steps; return rows and claims."""
    torch.manual_seed(0)
    model = Wide(width)
    processes = [psutil.Process(process) for process in (os.getpid(), *cluster.process_ids)]
    names = ["client", "coordinator", *(f"stage {index}" for index in range(len(processes) - 2))]
    with cluster.trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        loss=nn.functional.mse_loss,
        example=(torch.randn(rows, 4), torch.randn(rows)),
        # Left to itself, the planner would cut where little travels.
        plan=gradwire.Plan(stages=2, microbatches=micro_batches, cuts=["rest"]),
    ) as trainer:
        # Each micro-batch: its boundary forward and back; small ones also count the client's input and target.
        a_step = micro_batches * (4 if kind == "small" else 2)
        count = -(-messages // a_step)
        began = time.perf_counter()
        samples = list(steps(trainer, rows, count, processes))
        seconds = time.perf_counter() - began
        time.sleep(1.0)  # the last receipts may come a little after the step
        between = messages_between_servers(cluster)
    sent = between + (2 * micro_batches * count if kind == "small" else 0)
    fifth = max(1, len(samples) // 5)
    early, late = samples[:fifth], samples[-fifth:]
    rows_out: list[dict[str, object]] = []
    claims = [Claim.at_least(f"{kind} messages", sent, messages)]
    for index, name in enumerate(names):
        first = [sample[index] for sample in early]
        last = middle([sample[index] for sample in late])
        growth = last.resident_bytes - max(sample.resident_bytes for sample in first)
        shared = last.shared_bytes - max(sample.shared_bytes for sample in first)
        threads = last.threads - max(sample.threads for sample in first)
        blocks = last.blocks - max(sample.blocks for sample in first)
        descriptors = last.descriptors - max(sample.descriptors for sample in first)
        rows_out.append(
            {
                "messages": f"{sent:,} {kind}",
                "process": name,
                "steps": count,
                "seconds": seconds,
                "resident MiB": last.resident_bytes / 2**20,
                "growth MiB": growth / 2**20,
                "shared MiB": last.shared_bytes / 2**20,
                "growth MiB ": shared / 2**20,
                "threads": last.threads,
                "more": threads,
                "blocks": last.blocks,
                "more ": blocks,
                "others": last.descriptors,
                "more  ": descriptors,
            }
        )
        claims += [
            Claim.below(
                f"resident memory flat: growth of {name}, MiB ({kind})", growth / 2**20, NOISE_BYTES[kind] / 2**20
            ),
            Claim.below(
                f"shared memory bounded: growth of {name}, MiB ({kind})", shared / 2**20, SHARED_BYTES[kind] / 2**20
            ),
            Claim.below(f"no thread growth: {name} ({kind})", threads, POOL_THREADS),
            Claim.below(f"blocks of shared memory bounded: {name} ({kind})", blocks, MORE_BLOCKS[kind] + 1),
            Claim.below(f"no file descriptor growth: {name} ({kind})", descriptors, 1),
        ]
    return rows_out, claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=10**6, help="small messages, of a few hundred bytes")
    parser.add_argument("--large", type=int, default=10**3, help="large messages, of 16 MiB")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with gradwire.local(stage_servers=2, threads=1) as cluster:
        rows, claims = soak(
            cluster, "small", width=64, rows=32, micro_batches=SMALL_MICRO_BATCHES, messages=arguments.small
        )
        more_rows, more_claims = soak(
            cluster, "large", width=2**16, rows=512, micro_batches=LARGE_MICRO_BATCHES, messages=arguments.large
        )
    finish("Soak: what grows", rows + more_rows, claims + more_claims, arguments)


if __name__ == "__main__":
    main()
