"""The 6.5 M-parameter GPT in 2 stages, beside one process and torch's pipelining over gloo: tokens a second.

All stand ready side by side and take turns, round after round; each row is the median of its rounds, and the ratios
are between medians of the same run. Also measured: what the coordinator and the client cost while we train, and how
long a local cluster takes from nothing to its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch

import gradwire
from gradwire.job.gpt import next_byte_loss
from peers import BATCH, LEARNING_RATE, MICRO_BATCHES, PEERS, TOKENS_A_STEP, Peer, make_batch, make_model
from report import Claim, add_arguments, finish

OURS = "gradwire, 2 stage servers"
STEPS_A_ROUND = 3

FIRST_STEP = """
import gradwire, torch
from gradwire.job.gpt import next_byte_loss
from peers import MICRO_BATCHES, make_batch, make_model
with gradwire.local(stage_servers=2, threads=1) as cluster:
    model = make_model()
    trainer = cluster.trainer(
        model, torch.optim.AdamW(model.parameters()), loss=next_byte_loss, example=make_batch(),
        plan=gradwire.Plan(stages=2, microbatches=MICRO_BATCHES),
    )
    trainer.step(*make_batch())
    print("stepped", flush=True)
"""


def seconds_to_first_step() -> float:
    """Return the seconds from starting Python to the end of the first training step of a new local cluster."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", FIRST_STEP], stdout=subprocess.PIPE, text=True, cwd=sys.path[0]
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
    if line != "stepped\n" or process.returncode != 0:
        raise RuntimeError(f"the first step failed with {process.returncode}")
    return seconds


class Ours:
    """Our trainer, as a peer; keeps account of what the control plane costs while it runs."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        cluster = stack.enter_context(gradwire.local(stage_servers=2, threads=1))
        model = make_model()
        self._trainer = stack.enter_context(
            cluster.trainer(
                model,
                torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
                loss=next_byte_loss,
                example=make_batch(),
                plan=gradwire.Plan(stages=2, microbatches=MICRO_BATCHES),
            )
        )
        self._control = [psutil.Process(), psutil.Process(cluster.process_ids[0])]
        self._batch = make_batch()
        self.control_seconds = self.seconds = 0.0
        self.bubbles: list[float] = []

    def run(self, steps: int) -> float:
        before = self._control_cpu()
        started = time.perf_counter()
        self.bubbles += [result.bubble for result in self._trainer.run([self._batch] * steps, progress=False)]
        seconds = time.perf_counter() - started
        self.control_seconds += self._control_cpu() - before
        self.seconds += seconds
        return seconds

    def _control_cpu(self) -> float:
        times = [process.cpu_times() for process in self._control]
        return sum(each.user + each.system for each in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    first_step = [seconds_to_first_step() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        ours = Ours(stack)
        contenders: dict[str, Callable[[int], float]] = {OURS: ours.run}
        contenders |= {name: stack.enter_context(Peer(name)).run for name in PEERS}
        for run in contenders.values():
            run(2)
        ours.control_seconds = ours.seconds = 0.0
        ours.bubbles.clear()
        rounds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, run in contenders.items():
                rounds[name].append(STEPS_A_ROUND * TOKENS_A_STEP / run(STEPS_A_ROUND))

    speed = {name: statistics.median(values) for name, values in rounds.items()}
    one = speed["one process, 1 thread"]
    rows = [
        {"contender": name, "tokens a second": value, "× one process": value / one, "slowest": min(rounds[name])}
        for name, value in sorted(speed.items(), key=lambda item: item[1])
    ]
    share = ours.control_seconds / ours.seconds
    print(f"bubble of ours, measured: {statistics.median(ours.bubbles):.3f}")
    claims = [
        Claim.at_least("2 stages against one process with one thread, tokens a second", speed[OURS] / one, 1.65),
        Claim.at_least(
            "2 stages against torch.distributed.pipelining 1F1B over gloo, tokens a second",
            speed[OURS] / speed["torch pipelining on gloo, 1F1B"],
            0.98,
        ),
        Claim.below("coordinator and client together, share of one core while training", share, 0.03),
        Claim.below("start-up of a local cluster to the first step, seconds", statistics.median(first_step), 12.0),
    ]
    title = f"GPT, 8 layers of width 256, context 128, batch {BATCH}, {MICRO_BATCHES} micro-batches"
    finish(title, rows, claims, arguments)


if __name__ == "__main__":
    main()
