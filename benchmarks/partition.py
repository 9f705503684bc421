"""What it is worth to cut a model by what its layers cost on the devices at hand, beside an even split by layers.

Twelve layers on two stage servers: an uneven model on devices alike; one whose layers are alike, where one of the
devices is three times slower; and both at once. Layers sleep (layer_sleeping.py), longer on the slow server by an
environment variable: nobody tells the planner, which measures them on each. The even split has six layers on either
server; ours is a plan without cuts. The optimum is the fastest of all splits by layers and orders of the two devices,
each with the best schedule for it, simulated from the sleeps as they are. A step's time is that of one alone, the
period that between two ends where steps follow one another. Runs take turns; medians.

Then how long planning itself takes: a graph of 10,000 nodes with residual values over 64 devices, of one kind, of four,
and each different.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradwire
import layer_sleeping
import sleeping
from gradwire.run_plan import RunPlan
from gradwire.service_process import ServiceProcess, end_all
from gradwire_coordinator.auto_schedule import best_schedule
from gradwire_coordinator.costs import TravellingValue
from gradwire_coordinator.partition import find_partition
from gradwire_coordinator.partition_problem import HeldTensor, PartitionProblem
from gradwire_coordinator.placement import looped
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts
from report import Claim, add_arguments, finish

LAYERS = 12
MICRO_BATCHES = 16
# Half of what a layer of the small GPT takes.
FORWARD_SECONDS = 0.004
ALIKE = [FORWARD_SECONDS] * LAYERS
# As much in all, but the last layers are the widest.
UNEVEN = [FORWARD_SECONDS / 2] * 8 + [2 * FORWARD_SECONDS] * 4
SLOWER = 3.0
SLOW_DEVICE = "one of two devices 3 × slower"
# Name: (seconds of the layers, how much slower each server is).
CASES = {
    "uneven layers": (UNEVEN, (1.0, 1.0)),
    SLOW_DEVICE: (ALIKE, (1.0, SLOWER)),
    "both": (UNEVEN, (1.0, SLOWER)),
}
EVEN, PLANNED = "even split by layers", "planned"
GAIN, OFF_OPTIMUM = 1.5, 0.05
COLUMNS = (
    *("layers", "optimum, ms", "expected, ms", "step, ms", "× optimum"),
    *("period, ms", "throughput × even", "planning, s"),
)
NODES, DEVICES, PLANNING_SECONDS = 10_000, 64, 5.0
_START_SECONDS = 60.0


@contextlib.contextmanager
def two_servers(slowness: Sequence[float]) -> Iterator[gradwire.Cluster]:
    """Start a cluster of two servers, each so many times slower than it could be.

    A slow one says that it has two threads, and uses neither: devices of one make are taken to be equally fast.
    """
    flags = ["--listen", "127.0.0.1:0", "--operators", layer_sleeping.__file__]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(os.environ.pop, layer_sleeping.SLOWNESS, None)
        os.environ[layer_sleeping.SLOWNESS] = str(slowness[0])
        cluster = stack.enter_context(
            gradwire.local(stage_servers=1, threads=threads_of(slowness[0]), operators=[layer_sleeping.__file__])
        )
        os.environ[layer_sleeping.SLOWNESS] = str(slowness[1])
        flags += ["--coordinator", cluster.address, "--threads", str(threads_of(slowness[1]))]
        second = ServiceProcess("the second server", "gradwire_stage", flags, folder / "stage.log")
        stack.callback(end_all, [second], 5.0)
        deadline = time.monotonic() + _START_SECONDS
        second.wait_ready(deadline)
        while len(cluster.status().servers) < len(slowness):
            second.check_running()
            if time.monotonic() > deadline:
                raise TimeoutError("the second server did not register")
            time.sleep(0.05)
        yield cluster


def threads_of(slowness: float) -> int:
    """What a server so slow says of itself."""
    return 1 if slowness == 1.0 else 2


class Contender:
    """A split of the model, and what its turns gave, in seconds."""

    def __init__(self, seconds: Sequence[float], cuts: list[str] | None) -> None:
        self._seconds, self._cuts = seconds, cuts
        self.layers = ""
        self.expected: list[float] = []
        self.alone: list[float] = []
        self.following: list[float] = []

    def turn(self, cluster: gradwire.Cluster, steps: int) -> None:
        model = nn.Sequential(*map(layer_sleeping.Layer, self._seconds))
        batch = (torch.ones(MICRO_BATCHES, sleeping.WIDTH), torch.zeros(MICRO_BATCHES, sleeping.WIDTH))
        with cluster.trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3),
            loss=nn.functional.mse_loss,
            example=batch,
            plan=gradwire.Plan(stages=2, microbatches=MICRO_BATCHES, cuts=self._cuts),
        ) as trainer:
            self.layers = _layers(trainer.plan)
            self.expected.append(trainer.plan.predicted.seconds)
            trainer.step(*batch)
            self.alone += [trainer.step(*batch).seconds for _ in range(steps)]
            ends = [time.perf_counter() for _ in trainer.run([batch] * (steps + 1), progress=False)]
        self.following += [later - earlier for earlier, later in itertools.pairwise(ends)]


def _layers(plan: RunPlan) -> str:
    """Say how many layers each stage has, and which server is the slow one."""
    starts = [0, *(int(stage.first_module.partition(".")[0]) for stage in plan.stages[1:]), LAYERS]
    counts = [later - earlier for earlier, later in itertools.pairwise(starts)]
    slow = plan.servers[0].device != plan.servers[1].device
    return " + ".join(
        f"{count}{' slow' if slow and '2 threads' in plan.servers[stage.server].device else ''}"
        for count, stage in zip(counts, plan.stages, strict=True)
    )


def optimum_seconds(seconds: Sequence[float], slowness: Sequence[float]) -> float:
    """Simulate every split by layers on every order of the servers, with the best schedule; messages take no time."""
    found = []
    for (first, second), cut in itertools.product(sorted(set(itertools.permutations(slowness))), range(1, LAYERS)):
        forward = [sum(seconds[:cut]) * first, sum(seconds[cut:]) * second]
        backward = [layer_sleeping.BACKWARD_TO_FORWARD * each for each in forward]
        stages = tuple(StageSeconds(f, b, b, 0.0) for f, b in zip(forward, backward, strict=True))
        costs = StepCosts(looped(2), stages, (LinkSeconds(0, 0, 0),), (StageBytes(0, 0),) * 2)
        found.append(best_schedule(costs, MICRO_BATCHES).best.simulation.seconds)
    return min(found)


def measure(case: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    seconds, slowness = CASES[case]
    optimum = optimum_seconds(seconds, slowness)
    contenders = {EVEN: Contender(seconds, [str(LAYERS // 2)]), PLANNED: Contender(seconds, None)}
    with two_servers(slowness) as cluster:
        for number in range(rounds):
            for contender in list(contenders.values())[:: 1 if number % 2 else -1]:
                contender.turn(cluster, steps)
    even = statistics.median(contenders[EVEN].following)
    rows = []
    for name, contender in contenders.items():
        step, following = statistics.median(contender.alone), statistics.median(contender.following)
        found = (
            *(contender.layers, 1e3 * optimum, 1e3 * statistics.median(contender.expected), 1e3 * step),
            *(step / optimum, 1e3 * following, even / following, None),
        )
        rows.append({"what": case, "split": name, **dict(zip(COLUMNS, found, strict=True))})
    return rows


def big_problem(kinds: int) -> PartitionProblem:
    """A graph of 10,000 nodes over 64 devices of so many kinds, each with a speed and a memory of its own."""
    random = np.random.default_rng(0)
    speeds = np.resize(np.linspace(1.0, 3.0, kinds), DEVICES)
    nodes = random.uniform(1e-5, 1e-3, NODES)
    # Every node's value is read by the next one, and every tenth by one further on, as a residual is.
    values = []
    for node in range(NODES - 1):
        further = [min(NODES - 1, node + 12)] if node % 10 == 0 else []
        size = int(random.integers(1, 64)) * 2**10
        values.append(TravellingValue(node, tuple(dict.fromkeys([node + 1, *further])), size, size))
    return PartitionProblem(
        seconds=np.outer(1 / speeds, nodes),
        cuts=range(1, NODES),
        placement=looped(DEVICES),
        values=values,
        tensors=[HeldTensor((node,), 2**20, 2**20, 2**21) for node in range(0, NODES, 5)],
        held_bytes=np.full(NODES, 2**16, dtype=np.int64),
        live=[DEVICES - stage for stage in range(DEVICES)],
        memory_bytes=[int(speed * 2**31) for speed in speeds],
    )


def planning_row(kinds: int, rounds: int) -> dict[str, Any]:
    problem = big_problem(kinds)
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        found = find_partition(problem)
        taken.append(time.perf_counter() - began)
    gap = "exact" if found.exact else f"{found.gap:.1%} from a bound"
    return {
        "what": f"{NODES:,} nodes, {DEVICES} devices, {kinds} kind{'s' * (kinds > 1)}",
        "split": gap,
        **dict.fromkeys(COLUMNS),
        "planning, s": statistics.median(taken),
    }


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    planned = {row["what"]: row for row in rows if row["split"] != EVEN}
    slow = planned[SLOW_DEVICE]
    planning = max(row["planning, s"] for row in rows if row["planning, s"] is not None)
    return [
        Claim.at_least(
            f"{LAYERS} layers, {SLOW_DEVICE}, throughput × an even split's", slow["throughput × even"], GAIN
        ),
        Claim.below(f"{LAYERS} layers, {SLOW_DEVICE}, off the simulated optimum", slow["× optimum"] - 1, OFF_OPTIMUM),
        Claim.below(f"a graph of {NODES:,} nodes planned over {DEVICES} devices, seconds", planning, PLANNING_SECONDS),
    ]


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw what a step takes under either split, and at the optimum."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradwire", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    height = 0.36
    for name, colour, shift in ((EVEN, "#888888", height / 2), (PLANNED, "#1f6feb", -height / 2)):
        mine = [row for row in rows if row["split"] == name]
        places = [len(CASES) - number + shift for number in range(len(mine))]
        bars = axes.barh(places, [row["step, ms"] for row in mine], height=height, color=colour, label=name)
        axes.bar_label(bars, [row["layers"] for row in mine], padding=4, fontsize=9)
        if name == PLANNED:
            optimum = [row["optimum, ms"] for row in mine]
            axes.scatter(optimum, places, marker="|", s=240, color="black", zorder=3, label="simulated optimum")
    axes.set_yticks([len(CASES) - number for number in range(len(CASES))], list(CASES))
    axes.set_xlim(0, 1.2 * max(row["step, ms"] for row in rows if row["step, ms"]))
    axes.set_xlabel("ms a step; the layers of the two stages beside it")
    axes.grid(visible=True, axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps a round, alone and one after the other")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the steps, as SVG (needs matplotlib)")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    torch.set_num_threads(1)
    forward, backward = layer_sleeping.besides()
    os.environ |= {"OMP_NUM_THREADS": "1", layer_sleeping.BESIDES: f"{forward},{backward}"}
    print(f"taken off the sleeps, as measured in plain torch: {1e3 * forward:.3f} and {1e3 * backward:.3f} ms")

    rows = [row for case in CASES for row in measure(case, arguments.rounds, arguments.steps)]
    rows += [planning_row(kinds, arguments.rounds) for kinds in (1, 4, DEVICES)]
    if arguments.plot:
        draw(rows, arguments.plot)
    finish(
        f"{LAYERS} layers that only sleep on 2 stage servers, {MICRO_BATCHES} micro-batches",
        rows,
        claims_of(rows),
        arguments,
    )


if __name__ == "__main__":
    main()
