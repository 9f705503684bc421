"""Which device takes which place in the pipeline: by counts of each kind, exactly; or by bounded local search.

Devices of equal speed and memory are interchangeable where all links are alike, so that a state needs only to say how
many of each kind are used. Leaves to others: what an order is worth (it is handed in), and cuts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import Floats, PartitionProblem
from gradwire_coordinator.segment_costs import Stage, any_device
from gradwire_coordinator.stage_search import TIE, StateGraph, Step

# Steps between states that an exact search takes on.
_STEPS = 6000
_BISECTIONS = 50
# Sums of a whole graph are off by less than this.
_ROUNDING = 1e-9
# Orders that are all tried.
_ALL_ORDERS = 130


def _steps_of_kinds(problem: PartitionProblem) -> float:
    """Return how many steps the state graph of all orders has."""
    return math.prod(float(len(kind) + 1) for kind in problem.kinds) * len(problem.kinds)


def by_kinds(problem: PartitionProblem) -> StateGraph | None:
    """Return the graph of all orders of devices; None if they cannot be told by counts, or are too many."""
    if not problem.one_stage_each or not problem.links_are_alike or _steps_of_kinds(problem) > _STEPS:
        return None
    counts = [len(kind) for kind in problem.kinds]
    layer: dict[tuple[int, ...], int] = {(0,) * len(counts): 0}
    states, steps = [1], []
    for server in range(problem.servers):
        following: dict[tuple[int, ...], int] = {}
        of_kind: list[list[tuple[int, int]]] = [[] for _ in counts]
        for used, number in layer.items():
            for kind, count in enumerate(counts):
                if used[kind] < count:
                    more = (*used[:kind], used[kind] + 1, *used[kind + 1 :])
                    of_kind[kind].append((number, following.setdefault(more, len(following))))
        steps.append(
            tuple(
                Step(any_device(problem, server, problem.kinds[kind][0]), *np.array(pairs, dtype=np.int64).T)
                for kind, pairs in enumerate(of_kind)
                if pairs
            )
        )
        states.append(len(following))
        layer = following
    return StateGraph(tuple(states), tuple(steps))


def devices_of(problem: PartitionProblem, stages: Iterable[Stage]) -> tuple[int, ...]:
    """Return devices for stages that name the first of a kind: those of a kind in the given order."""
    kind_of = {kind[0]: iter(kind) for kind in problem.kinds}
    return tuple(next(kind_of[stage.device]) for stage in stages)


def all_orders(problem: PartitionProblem) -> list[tuple[int, ...]] | None:
    """Return each order of devices that differs in what it costs; None if they are many."""
    devices = len(problem.seconds)
    if math.perm(devices, problem.servers) > _ALL_ORDERS:
        return None
    return list(itertools.permutations(range(devices), problem.servers))


def search_order(problem: PartitionProblem, worth: Callable[[Sequence[int], float], float], orders: int) -> list[int]:
    """Return the best order of devices that a local search finds, which weighs so many orders at the most.

    worth(order, least so far): less is better; may be anything that is not less where it is no better. Starts are the
    devices as given, by speed and by memory; from the best, places are swapped as long as that helps.
    """
    devices, servers = len(problem.seconds), problem.servers
    kind_of = {device: kind for kind, members in enumerate(problem.kinds) for device in members}
    best: list[int] = list(range(devices))
    least = math.inf
    seen: set[tuple[int, ...]] = set()

    def improves(order: list[int]) -> bool:
        nonlocal best, least
        used = order[:servers]
        key = tuple(kind_of[device] for device in used) if problem.links_are_alike else tuple(used)
        if key in seen or len(seen) >= orders:
            return False
        seen.add(key)
        found = worth(used, least)
        if not found < least * (1 - TIE):
            return False
        best, least = order, found
        return True

    for start in _starts(problem):
        improves(start)
    improved = True
    while improved:
        improved = False
        for first, second in _swaps(servers, devices):
            order = list(best)
            order[first], order[second] = order[second], order[first]
            improved = improves(order) or improved
    return best[:servers]


def lower_bound(problem: PartitionProblem, units: Units) -> float:
    """Return seconds that the busiest device of no order and no cuts is below; infinite if memory is too small.

    The largest unit on the device that is fastest at it; and all work, shared freely by the devices, each as much as
    its speed and its memory allow (work at prices that are no dearer than any device's own, the dual of such sharing).
    Transfers are left out.
    """
    first_of_kind = [kind[0] for kind in problem.kinds]
    seconds = np.stack([np.diff(units.seconds(device, False)) for device in first_of_kind])  # (kinds, units)
    largest = float(seconds.min(axis=0).max())
    total = seconds.sum(axis=1)
    if not (total > 0).all():
        return largest
    worth = (seconds / total[:, None]).min(axis=0)  # a unit's, in shares of what each device would take for all
    stages_each = problem.stages // problem.servers + (problem.stages % problem.servers > 0)
    shares = []
    for kind, members in enumerate(problem.kinds):
        most = _most_under(problem, units, worth, problem.limit(members[0])) * stages_each
        shares += [(1.0 / float(total[kind]), most)] * len(members)

    def done(slowest: float) -> float:
        """Return the most that the devices can do in this time."""
        return sum(sorted((min(slowest * speed, most) for speed, most in shares), reverse=True)[: problem.servers])

    everything = float(worth.sum()) * (1 - TIE)
    below, above = 0.0, float(total.max())
    if done(above) < everything * (1 - _ROUNDING):
        return np.inf
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        below, above = (middle, above) if done(middle) < everything else (below, middle)
    return max(largest, below) * (1 - TIE)


def _most_under(problem: PartitionProblem, units: Units, worth: Floats, limit: float) -> float:
    """Return the most worth of a segment that does not need more bytes than this."""
    if np.isinf(limit):
        return np.inf
    live = 1 if any(problem.recomputes) or not problem.live else min(problem.live)
    size = units.state.at_least + live * units.held
    running = np.concatenate([[0.0], np.cumsum(worth)])
    last = np.searchsorted(size, size + limit, side="right") - 1
    return float((running[last] - running).max())


def _starts(problem: PartitionProblem) -> Iterator[list[int]]:
    devices = range(len(problem.seconds))
    speed = problem.seconds.sum(axis=1)
    yield list(devices)
    yield sorted(devices, key=lambda device: float(speed[device]))
    yield sorted(devices, key=lambda device: -float(speed[device]))
    yield sorted(devices, key=lambda device: -problem.limit(device))
    if not problem.links_are_alike:
        yield _along_fast_links(problem)


def _along_fast_links(problem: PartitionProblem) -> list[int]:
    """Return a chain that goes on, from each device, over the fastest link to one that is left."""
    left = list(range(1, len(problem.seconds)))
    chain = [0]
    while left:
        fastest = max(left, key=lambda device: problem.link(chain[-1], device)[0])
        left.remove(fastest)
        chain.append(fastest)
    return chain


def _swaps(servers: int, devices: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of places to swap, near ones first; places from `servers` on are of devices that are left over."""
    for distance in range(1, devices):
        for first in range(min(servers, devices - distance)):
            yield first, first + distance
