"""What the pipeline costs beside the work: stages that only sleep, on 2 to 16 processes, beside torch's over gloo.

Each stage sleeps 5 ms forward and 10 ms backward, in 16 micro-batches of 4 KiB: a real model whose layers call an
operator of torch.library (sleeping.py), exported, cut, sent and run as any other. The ideal is the shortest that a step
can take, (m + p − 1) × 15 ms; a share is that over the median time from one step's end to the next one's, over all
rounds. Steps follow one another without a pause, on both sides, so that a share counts whatever lies between two steps,
too. Ours and torch's stand ready side by side and take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import gradwire
import sleeping
from peers import Peer
from report import Claim, add_arguments, finish

OURS = "gradwire"
OURS_ALONE = "gradwire, window 1"
TORCH = "torch pipelining on gloo, 1F1B"
BARS = {2: 0.98, 8: 0.97, 16: 0.95}


@dataclass
class Measured:
    """What the rounds of one contender gave."""

    steps: list[float] = field(default_factory=list)
    # Of whole rounds, a step: with the start of the first and the way back of the last.
    rounds: list[float] = field(default_factory=list)
    # Of the stages' processes, over all rounds.
    cpu_seconds: float = 0.0
    counted: int = 0

    def add(self, times: Sequence[float], began: float, ended: float, cpu_seconds: float) -> None:
        """Take in a round: when its steps ended. The first step also fills the pipeline: it is in the round alone."""
        self.steps += [later - earlier for earlier, later in itertools.pairwise(times)]
        self.rounds.append((ended - began) / len(times))
        self.cpu_seconds += cpu_seconds
        self.counted += len(times)


class Ours:
    """A cluster of stage servers, one sleeper each; trainers on it, one after the other."""

    def __init__(self, stack: contextlib.ExitStack, stages: int) -> None:
        self._stages = stages
        self._cluster = stack.enter_context(
            gradwire.local(stage_servers=stages, threads=1, operators=[sleeping.__file__])
        )
        self._servers = [psutil.Process(number) for number in self._cluster.process_ids[1:]]
        self._batch = sleeping.make_batch()

    def trainer(self, window: int) -> gradwire.Trainer:
        model = nn.Sequential(*(sleeping.Sleeper() for _ in range(self._stages)))
        return self._cluster.trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3),
            loss=nn.functional.mse_loss,
            example=self._batch,
            plan=gradwire.Plan(
                stages=self._stages,
                microbatches=sleeping.MICRO_BATCHES,
                window=window,
                cuts=[str(stage) for stage in range(1, self._stages)],
            ),
        )

    def run(self, trainer: gradwire.Trainer, steps: int, measured: Measured) -> None:
        before = self._cpu()
        began = time.perf_counter()
        times = [time.perf_counter() for _ in trainer.run([self._batch] * steps, progress=False)]
        measured.add(times, began, time.perf_counter(), self._cpu() - before)

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self._servers]
        return sum(each.user + each.system for each in times)


def run_torch(peer: Peer, steps: int, measured: Measured) -> None:
    """One round; the first stage's clock counts, for it ends last."""
    answers = [json.loads(line) for line in peer.ask(steps)]
    first = answers[0]
    began, *times = first["times"]
    measured.add(times, began, began + first["whole"], sum(answer["cpu"] for answer in answers))


def measure(stages: int, rounds: int, steps: int, *, alone: bool) -> dict[str, Measured]:
    """Measure all contenders on so many processes."""
    found = {OURS: Measured(), TORCH: Measured()}
    with contextlib.ExitStack() as stack:
        ours = Ours(stack, stages)
        peer = stack.enter_context(Peer(str(stages), processes=stages, script=sleeping.__file__))
        with ours.trainer(window=2) as trainer:
            turns: list[tuple[str, Callable[[int, Measured], None]]] = [
                (OURS, lambda count, measured: ours.run(trainer, count, measured)),
                (TORCH, lambda count, measured: run_torch(peer, count, measured)),
            ]
            for _, run in turns:
                run(2, Measured())
            for number in range(rounds):
                for name, run in turns if number % 2 else turns[::-1]:
                    run(steps, found[name])
        if alone:
            found[OURS_ALONE] = Measured()
            with ours.trainer(window=1) as trainer:
                ours.run(trainer, 2, Measured())
                for _ in range(rounds):
                    ours.run(trainer, steps, found[OURS_ALONE])
    return found


def row_of(stages: int, name: str, measured: Measured) -> dict[str, Any]:
    ideal = sleeping.ideal_seconds(stages)
    actions = 2 * stages * sleeping.MICRO_BATCHES
    slow = sorted(measured.steps)[-1 - len(measured.steps) // 10]
    return {
        "processes": stages,
        "contender": name,
        "ideal, ms": 1e3 * ideal,
        "step, ms": 1e3 * statistics.median(measured.steps),
        "share of ideal": ideal / statistics.median(measured.steps),
        "slow tenth": ideal / slow,
        "whole rounds": ideal / statistics.median(measured.rounds),
        "CPU ms an action": 1e3 * measured.cpu_seconds / (actions * measured.counted),
    }


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    shares = {(row["processes"], row["contender"]): row["share of ideal"] for row in rows}
    claims = []
    for stages in sorted({row["processes"] for row in rows}):
        ours, theirs = shares[stages, OURS], shares[stages, TORCH]
        if stages in BARS:
            claims.append(Claim.at_least(f"{stages} stages, share of the ideal makespan", ours, BARS[stages]))
        claims.append(Claim.at_least(f"{stages} stages, against torch pipelining on gloo", ours / theirs, 1.0))
    return claims


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the shares over the number of processes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradwire", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = {OURS: ("#1f6feb", "o", "-"), OURS_ALONE: ("#1f6feb", "o", ":"), TORCH: ("#d1570a", "s", "-")}
    for name, (colour, marker, line) in styles.items():
        mine = [row for row in rows if row["contender"] == name]
        if mine:
            axes.plot(
                [row["processes"] for row in mine],
                [row["share of ideal"] for row in mine],
                color=colour,
                marker=marker,
                linestyle=line,
                label=name,
            )
    axes.axhline(1.0, color="#888888", linewidth=1)
    axes.set_xscale("log", base=2)
    counts = sorted({row["processes"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("processes, one stage each")
    axes.set_ylabel("ideal ÷ measured time of a step")
    axes.set_title("Stages that only sleep: 5 ms forward, 10 ms backward, 16 micro-batches", fontsize=11)
    axes.grid(visible=True, axis="y", color="#dddddd")
    axes.legend(frameon=False)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16], metavar="P")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps a round")
    parser.add_argument("--window-1", action="store_true", help="also with one step open at a time")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the shares, as SVG (needs matplotlib)")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    torch.set_num_threads(1)
    forward, backward = sleeping.besides()
    os.environ |= {"OMP_NUM_THREADS": "1", sleeping.BESIDES: f"{forward},{backward}"}
    print(f"taken off the sleeps, as measured in plain torch: {1e3 * forward:.3f} and {1e3 * backward:.3f} ms")

    rows = []
    for stages in arguments.processes:
        found = measure(stages, arguments.rounds, arguments.steps, alone=arguments.window_1)
        rows += [row_of(stages, name, measured) for name, measured in found.items()]
    if arguments.plot:
        draw(rows, arguments.plot)
    title = f"A chain of sleeping stages: 5 ms forward, 10 ms backward, {sleeping.MICRO_BATCHES} micro-batches"
    finish(title, rows, claims_of(rows), arguments)


if __name__ == "__main__":
    main()
