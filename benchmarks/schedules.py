"""Every schedule as measured, beside its simulation, its theory, and torch.distributed.pipelining's own over gloo.

Two works, one a run: `gpt`, the 6.5 M-parameter GPT on 2 processes with a thread each, beside one such process alone,
and two that have nothing to do with each other, the most that the machine gives; and `sleeping`, layers that only sleep
(split_sleeping.py): 30 ms forward, as long for input gradients and for weight gradients a process and micro-batch, 16
micro-batches, on 2, 4 and 8 processes. (What an action costs beside its work is another benchmark's question,
overhead.py; `--milliseconds 5` makes it one of this too.) What is ours is asked for by a plan, as any other; simulated
is what `trainer.plan` expects before the first step, from costs that were measured right before it. Machines are now
faster, now slower, so each simulation is compared with the steps of its own run.

A step's time is that of one alone, from the first process's start to the last one's end; the period that between two
ends where steps follow one another. A bubble is the share of a step in which a process was not in its stages or its
optimizer. In theory, F, I and W take equally long and messages nothing. The bound is what no order beats on the same
placement: max(busiest device + unavoidable fill), with the sleeps as they are. All take turns, round after round;
medians.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sleeping
import split_sleeping
from gradwire_coordinator.lower_bound import lower_bound
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts
from peers import BATCH, MICRO_BATCHES, SHAPE, TOKENS_A_STEP
from report import Claim, add_arguments, finish
from schedule_turns import ONE_PROCESS, OURS, TORCH, TWO_PROCESSES, Measured, measure
from works import GPT, SLEEPING, work_of

# What a schedule adds to the work of a step on p processes, in units of F = I = W of a process's part.
ADDED: dict[str, Callable[[int], float]] = {
    "gpipe": lambda p: 3 * (p - 1),
    "1f1b": lambda p: 3 * (p - 1),
    "interleaved-1f1b": lambda p: 3 * (p - 1) / 2,
    "zb-h1": lambda p: p - 1,
    "zb-v": lambda p: (p - 1) / 2,
}
PUBLISHED_AS = {"GPipe": "gpipe", "1F1B": "1f1b", "Interleaved1F1B": "interleaved-1f1b", "ZBVZeroBubble": "zb-v"}
# Simulated and measured, apart by this at most.
AGREE = {GPT: 0.10, SLEEPING: 0.05}
OF_ONE_PROCESS = 1.80
OF_BOUND, BOUND_AT = 0.95, (4, 8)


def bound_seconds(placement: Placement) -> float:
    """The least that a step of sleeping layers takes on these processes, whatever the order of its actions."""
    each = len(placement) // (1 + max(placement))
    part = split_sleeping.part_seconds() * split_sleeping.LAYERS_A_PROCESS / each
    stages = (StageSeconds.in_parts(part, part, part),) * len(placement)
    links = (LinkSeconds(0, 0, 0),) * (len(placement) - 1)
    costs = StepCosts(placement, stages, links, (StageBytes(0, 0),) * len(placement))
    return lower_bound(costs, sleeping.MICRO_BATCHES)


def rows_of(work: str, processes: int, found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    rows = []
    for name, measured in found.items():
        own = name.partition(", ")[2]
        step, following = statistics.median(measured.alone), statistics.median(measured.following)
        added = ADDED.get(PUBLISHED_AS.get(own, own))
        blocks = added(processes) if added else None
        of_work = 3 * work_of(work, processes).micro_batches
        simulated = statistics.median(measured.simulated) if measured.simulated else None
        row = {
            "p": processes,
            "contender": name,
            "bubble": 1 - statistics.median(measured.busy) / step,
            "simulated": statistics.median(measured.simulated_bubble) if measured.simulated_bubble else None,
            "theory": None if blocks is None else blocks / (of_work + blocks),
            "step, ms": 1e3 * step,
            "simulated, ms": None if simulated is None else 1e3 * simulated,
            "off by": abs(statistics.median(measured.agreement) - 1) if measured.agreement else None,
            "period, ms": 1e3 * following,
        }
        if work == GPT:
            row["tokens a second"] = TOKENS_A_STEP / following
            row["× one process"] = statistics.median(found[ONE_PROCESS].following) / following
        else:
            bound = bound_seconds(measured.placement)
            row["bound, ms"], row["share of bound"] = 1e3 * bound, bound / step
        rows.append(row)
    return rows


def claims_of(work: str, rows: Sequence[dict[str, Any]]) -> list[Claim]:
    return [*(_gpt_claims(rows) if work == GPT else _sleeping_claims(rows)), *_agreement_claims(work, rows)]


def _gpt_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    ours, theirs = (
        max(row["× one process"] for row in rows if row["contender"].startswith(side)) for side in (OURS, TORCH)
    )
    return [
        Claim.at_least("GPT, 2 stages: best schedule × one process with one thread", ours, OF_ONE_PROCESS),
        Claim.at_least("GPT, 2 stages: best schedule × torch's best", ours / theirs, 1.0),
    ]


def _sleeping_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    claims = []
    for processes in sorted({row["p"] for row in rows}.intersection(BOUND_AT)):
        here = {row["contender"]: row for row in rows if row["p"] == processes}
        one, two = here[f"{OURS}, auto"], here[f"{OURS}, auto, v = 2"]
        theirs = min(row["step, ms"] for name, row in here.items() if name.startswith(TORCH))
        stages = f"{processes} sleeping stages"
        claims += [
            Claim.at_least(f"{stages}: auto, share of the lower bound", one["share of bound"], OF_BOUND),
            Claim.at_least(f"{stages}: auto, v = 2, share of the lower bound", two["share of bound"], OF_BOUND),
            # The fastest of theirs have two stages a process, too.
            Claim.at_least(f"{stages}: auto, v = 2 × torch's fastest schedule", theirs / two["step, ms"], 1.0),
        ]
    return claims


def _agreement_claims(work: str, rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Of all schedules, the one whose simulation is off by most."""
    claims = []
    for processes in sorted({row["p"] for row in rows}):
        off = [row["off by"] for row in rows if row["p"] == processes and row["off by"] is not None]
        what = "GPT, 2 stages" if work == GPT else f"{processes} sleeping stages"
        claims.append(Claim.below(f"{what}: simulated and measured step time, most off", max(off), AGREE[work]))
    return claims


def draw(title: str, rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the bubbles of all contenders, measured, simulated and in theory: a panel for each number of processes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradwire", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    from matplotlib import pyplot as plt

    counts = sorted({row["p"] for row in rows})
    figure, panels = plt.subplots(
        1, len(counts), figsize=(3.4 + 2.6 * len(counts), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    panels[0][0].invert_yaxis()
    for axes, processes in zip(panels[0], counts, strict=True):
        mine = [row for row in rows if row["p"] == processes and row["contender"] not in (ONE_PROCESS, TWO_PROCESSES)]
        for side, colour in ((OURS, "#1f6feb"), (TORCH, "#d1570a")):
            bars = {row["contender"]: row["bubble"] for row in mine if row["contender"].startswith(side)}
            axes.barh(list(bars), list(bars.values()), color=colour, height=0.6, label=f"{side}, measured")
        for column, marker, size in (("simulated", "D", 20), ("theory", "|", 160)):
            known = [(row[column], row["contender"]) for row in mine if row[column] is not None]
            if known:
                values, places = zip(*known, strict=True)
                axes.scatter(values, places, marker=marker, s=size, color="black", zorder=3, label=column)
        axes.set_title(f"{processes} processes", fontsize=10)
        axes.set_xlabel("bubble")
        axes.grid(visible=True, axis="x", color="#dddddd")
        axes.set_axisbelow(True)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=(GPT, SLEEPING))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8], metavar="P", help="of sleeping layers")
    parser.add_argument("--milliseconds", type=float, default=30.0, help="F, I and W of a process that sleeps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps a round, alone and one after the other")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the bubbles, as SVG (needs matplotlib)")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.work == SLEEPING:
        seconds = arguments.milliseconds / 1e3 / split_sleeping.LAYERS_A_PROCESS
        os.environ[split_sleeping.PART_SECONDS] = str(seconds)
        forward, part = split_sleeping.besides()
        os.environ[split_sleeping.BESIDES] = f"{forward},{part}"
        print(f"taken off the sleeps, as measured in plain torch: {1e3 * forward:.3f} and {1e3 * part:.3f} ms")

    rows = []
    for processes in (2,) if arguments.work == GPT else arguments.processes:
        rows += rows_of(
            arguments.work, processes, measure(arguments.work, processes, arguments.rounds, arguments.steps)
        )
    title = {
        GPT: f"GPT, {SHAPE.layers} layers of width {SHAPE.width}, batch {BATCH}, {MICRO_BATCHES} micro-batches",
        SLEEPING: f"Layers that only sleep: {arguments.milliseconds:g} ms F, I and W a process, "
        f"{sleeping.MICRO_BATCHES} micro-batches",
    }[arguments.work]
    if arguments.plot:
        draw(title, rows, arguments.plot)
    finish(title, rows, claims_of(arguments.work, rows), arguments)


if __name__ == "__main__":
    main()
