"""What to say where a model does not fit: which server lacks how many bytes at the best attempt, and what would fit.

Leaves to others: what else could be tried (it is handed in, ready to be solved), and solving it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gradwire_coordinator.cut_search import CutSearch
from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import PartitionProblem, ServerMemory
from gradwire_coordinator.segment_costs import Block, Stage, stages_on
from gradwire_protocol.errors import PlanError

# Possible cuts that an attempt weighs.
_CUTS = 512


@dataclass(frozen=True)
class Alternative:
    """Another plan that may fit. what: it changes; of those that change the same, the first that fits is named.

    problem: made only if it is asked for.
    """

    what: str
    # As a remedy: "set recompute=True".
    remedy: str
    problem: Callable[[], PartitionProblem]


def does_not_fit(
    problem: PartitionProblem,
    units: Units,
    devices: Sequence[int],
    alternatives: Sequence[Alternative],
    fits: Callable[[PartitionProblem], bool],
) -> PlanError:
    """Return the error of a problem that has no solution, by the best attempt on devices in this order."""
    stages = stages_on(problem, devices)
    search = CutSearch(units, problem, stages)
    ends = least_excess(units, stages)
    held = [search.memory(ends, server) for server in range(problem.servers)]
    worst = max(range(problem.servers), key=lambda server: held[server].missing)
    remedies: dict[str, str] = {}
    for alternative in alternatives:
        if alternative.what not in remedies and fits(alternative.problem()):
            remedies[alternative.what] = alternative.remedy
    tried = dict.fromkeys(alternative.what for alternative in alternatives)
    otherwise = "use servers with more memory" + (f"; neither {', nor '.join(tried)} would do" if tried else "")
    return PlanError(
        f"The model does not fit: at the best attempt, {_describe_place(problem, worst)} lacks"
        f" {held[worst].missing:,} bytes",
        expected=f"{in_units(held[worst].limit)} at most on its device (number {devices[worst]})",
        got=_describe(held[worst]),
        remedy=f"this would fit: {', or '.join(remedies.values())}" if remedies else otherwise,
    )


def least_excess(units: Units, stages: Sequence[Stage]) -> list[int]:
    """Return the cuts, out of a part of the possible ones, whose largest excess over a device's memory is least."""
    coarse, places = units.coarse(max(_CUTS, 4 * len(stages)))
    everything = slice(0, coarse.count + 1)
    block = Block(coarse, everything, everything)
    largest = np.full(coarse.count + 1, np.inf)
    largest[0] = 0.0
    chosen = []
    for stage in stages:
        excess = np.maximum(block.excess(stage), largest[:, None])
        chosen.append(excess.argmin(axis=0))
        largest = excess.min(axis=0)
    ends = [coarse.count]
    for start_of in reversed(chosen):
        ends.append(int(start_of[ends[-1]]))
    return [places[end] for end in reversed(ends)]


def _describe_place(problem: PartitionProblem, server: int) -> str:
    """Return a server's place in words: "server 2", or "server 2 with stages 2, 5"."""
    stages = problem.hosted[server]
    return f"stage {server}" if problem.one_stage_each else f"server {server} with stages {', '.join(map(str, stages))}"


def in_units(size_bytes: float) -> str:
    """Return bytes in a unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"


def _describe(held: ServerMemory) -> str:
    parts = [
        (held.weights, "weights"),
        (held.gradients, "gradients"),
        (held.optimizer, "optimizer state"),
        (held.activations, "activations"),
    ]
    return f"{in_units(held.total)}: " + ", ".join(f"{in_units(size)} of {what}" for size, what in parts if size)
