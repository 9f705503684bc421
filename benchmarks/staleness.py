"""Parameter servers and staleness, with one replica that is held up now and then: steps a second, and the loss.

A small byte-level GPT in two replicas of one stage server each, and a parameter server. One of the stage servers is
stopped for a while at random moments (SIGSTOP), the same ones for every contender: that is what another job on its host
looks like. Contenders take turns, each from the same first weights through the same batches; the losses are means over
the last tenth of the steps. The ring stands beside them: it waits for the slower one in every step.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import torch

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from gradwire.job.text import Windows, load_text
from report import add_arguments, finish

RING = "ring"
SHAPE = Shape(layers=2, width=64, heads=4, context=64)
ROWS, MICRO_BATCHES = 32, 8
# How long one of the replicas runs and stands still in turns, in seconds: from, to.
RUNS, STANDS = (0.2, 0.6), (0.1, 0.3)


class Hold:
    """Stops a process at random moments, from `begin` to `end`."""

    def __init__(self, process: psutil.Process, seed: int) -> None:
        self._process = process
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Hold:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _main(self) -> None:
        while not self._over.wait(self._random.uniform(*RUNS)):
            self._process.suspend()
            try:
                self._over.wait(self._random.uniform(*STANDS))
            finally:
                self._process.resume()


def batches(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield windows of real text, the same ones each time."""
    text = load_text(None, SHAPE.context + 2).training
    return itertools.islice(Windows(text, context=SHAPE.context, batch=ROWS, seed=0).from_step(0), steps)


def process_at(cluster: gradwire.LocalCluster, server: str) -> psutil.Process:
    """Return the process that listens at a server's address."""
    address = next(each.address for each in cluster.status().servers if each.server == server)
    port = int(address.rpartition(":")[2])
    return next(
        process
        for process in map(psutil.Process, cluster.process_ids)
        if any(item.laddr.port == port and item.status == psutil.CONN_LISTEN for item in process.net_connections())
    )


@contextmanager
def trainer_of(cluster: gradwire.LocalCluster, staleness: int | None) -> Iterator[gradwire.Trainer]:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    fields: dict[str, Any] = {"exchange": "ring", "zero": "off"}
    if staleness is not None:
        fields = {"exchange": "parameter-server", "staleness": staleness}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plan = gradwire.Plan(replicas=2, microbatches=MICRO_BATCHES, schedule="1f1b", window=6, **fields)
    with cluster.trainer(model, optimizer, loss=next_byte_loss, example=next(batches(1)), plan=plan) as trainer:
        yield trainer


def measure(
    cluster: gradwire.LocalCluster, staleness: int | None, steps: int, *, held: bool, seed: int
) -> dict[str, Any]:
    with trainer_of(cluster, staleness) as trainer:
        process = process_at(cluster, trainer.servers[1])
        for x, y in batches(2):  # the first steps load what the others need not
            trainer.step(x, y)
        started = time.perf_counter()
        with Hold(process, seed) if held else nullcontext():
            losses = [result.loss for result in trainer.run(batches(steps), progress=False)]
        seconds = time.perf_counter() - started
    return {"steps a second": steps / seconds, "loss": statistics.mean(losses[-max(1, steps // 10) :])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    add_arguments(parser)
    arguments = parser.parse_args()
    contenders: list[int | None] = [None, *arguments.staleness]
    found: dict[tuple[int | None, bool], list[dict[str, Any]]] = {}
    with gradwire.local(stage_servers=2, parameter_servers=1, threads=1) as cluster:
        for number in range(arguments.rounds):
            for held in (False, True):
                for contender in contenders:
                    made = measure(cluster, contender, arguments.steps, held=held, seed=number)
                    found.setdefault((contender, held), []).append(made)
    rows = [row_of(contender, held, made, found[None, held]) for (contender, held), made in found.items()]
    finish("One of two replicas held up now and then", rows, [], arguments)


def row_of(
    contender: int | None, held: bool, made: Sequence[dict[str, Any]], ring: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    ratios = [own["steps a second"] / other["steps a second"] for own, other in zip(made, ring, strict=True)]
    return {
        "exchange": RING if contender is None else f"parameter-server, staleness {contender}",
        "one replica": "held up" if held else "free",
        "steps a second": statistics.median(each["steps a second"] for each in made),
        "× ring": statistics.median(ratios),
        "loss, nats a byte": statistics.mean(each["loss"] for each in made),
    }


if __name__ == "__main__":
    main()
