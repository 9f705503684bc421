"""Where to cut a graph, and which device takes which part, so that the busiest device is as fast as it can be.

Under each device's memory, transfers counted. Exact for one stage a device: for a given order of devices, and over
orders by counts of each kind, as long as that is some seconds' work; otherwise a bounded local search that says how far
it is from a lower bound at the most. Pure: costs come in, cuts go out. Leaves to others: where costs come from
(`partition_inputs.py`), and the parts of the search: `stage_search.py`, `device_order.py`, `cut_search.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradwire_coordinator.cut_search import CutSearch, Worth
from gradwire_coordinator.device_order import all_orders, by_kinds, devices_of, lower_bound, search_order
from gradwire_coordinator.fit_errors import Alternative, does_not_fit, least_excess
from gradwire_coordinator.interval_sums import Units
from gradwire_coordinator.partition_problem import Partition, PartitionProblem
from gradwire_coordinator.segment_costs import stages_on
from gradwire_coordinator.stage_search import Solution, StageSearch, StateGraph
from gradwire_coordinator.windows import Windows
from gradwire_protocol.errors import PlanError

# Possible cuts that are left where all of them are too much work.
_COARSE = (2048, 1024, 512)
# At the least, for each stage; and for the search of an order.
_CUTS_A_STAGE = 8
_ORDER_CUTS = 256
# Orders that a local search weighs, with one stage a server, and with several.
_ORDERS = 100
_ORDERS_OF_SEVERAL = 8
# Balanced cuts from which a local search starts.
_STARTS = 2
# Cuts and orders that are all tried, where servers have several stages.
_ALL = 3000
_EQUAL = 1e-9


@dataclass(frozen=True)
class _Found:
    """Cuts by place among the possible ones, and devices by server. exact: no other cuts or orders are faster."""

    ends: Sequence[int]
    devices: Sequence[int]
    slowest: float
    sent_bytes: float
    lower_bound: float
    exact: bool

    def better_than(self, other: _Found | None) -> bool:
        """Whether its slowest stage is faster, or as fast with fewer bytes."""
        return other is None or (
            self.slowest < other.slowest * (1 - _EQUAL)
            or (self.slowest <= other.slowest * (1 + _EQUAL) and self.sent_bytes < other.sent_bytes)
        )


def find_partition(problem: PartitionProblem, alternatives: Sequence[Alternative] = ()) -> Partition:
    """Return the partition whose busiest device is fastest; among equals, the one that sends the fewest bytes.

    With several stages a device, the largest stage counts next. Devices stay in the given order where another is no
    better, and like devices always. PlanError if there are not enough cuts, or memory; it names those of the
    `alternatives` that would fit.
    """
    check_stage_count(problem.stages, problem.cuts)
    units = Units(problem, problem.cuts)
    found = _solve(problem, units)
    if found is None:
        devices = sorted(range(len(problem.seconds)), key=lambda device: -problem.limit(device))
        order = range(problem.servers) if problem.order_is_fixed else devices[: problem.servers]
        raise does_not_fit(problem, units, order, alternatives, _fits)
    search = CutSearch(units, problem, stages_on(problem, found.devices))
    server_seconds = search.server_seconds(found.ends)
    slowest = max(server_seconds)
    exact = found.exact or slowest <= found.lower_bound * (1 + _EQUAL)
    return Partition(
        cuts=tuple(int(units.ends[end]) for end in found.ends[1:-1]),
        devices=tuple(found.devices),
        seconds=tuple(search.seconds(found.ends)),
        server_seconds=tuple(server_seconds),
        lower_bound=slowest if exact else min(slowest, found.lower_bound),
        exact=exact,
        memory=tuple(search.memory(found.ends, server) for server in range(problem.servers)),
        sent_bytes=int(search.sent_bytes(found.ends)),
    )


def _fits(problem: PartitionProblem) -> bool:
    if problem.stages > len(problem.cuts) + 1:
        return False
    return _solve(problem, Units(problem, problem.cuts)) is not None


def _solve(problem: PartitionProblem, units: Units) -> _Found | None:
    given = range(problem.servers)
    if not problem.one_stage_each and _are_few(problem):
        return _best_of_all(problem, units)
    if problem.order_is_fixed:
        return _with_order(problem, units, given)
    bound = lower_bound(problem, units)
    if np.isinf(bound):
        return None
    if len(problem.kinds) == 1 and problem.links_are_alike:
        return _with_order(problem, units, given)
    graph = by_kinds(problem)
    if graph is not None:
        return _by_kinds(problem, units, graph, bound)
    orders = all_orders(problem) if problem.one_stage_each else None
    if orders is not None:
        return _best_of(problem, units, orders)
    found = _with_order(problem, units, _searched_order(problem, units))
    return found and dataclasses.replace(found, lower_bound=bound, exact=False)


def _by_kinds(problem: PartitionProblem, units: Units, graph: StateGraph, bound: float) -> _Found | None:
    """Search all orders; or, where that is too much, those of a part of the cuts, and then the cuts for the best."""
    given = _with_order(problem, units, range(problem.servers))
    outcome = StageSearch(units, graph).solve(given.slowest * (1 + _EQUAL) if given else np.inf)
    if not outcome.too_much:
        if outcome.solution is None:
            return given
        best = _of_solution(outcome.solution, devices_of(problem, outcome.solution.stages))
        if given is not None and not best.better_than(given):
            best = given
        return dataclasses.replace(best, lower_bound=best.slowest, exact=True)
    coarse, _ = _coarse_for_orders(problem, units)
    rough = StageSearch(coarse, graph).solve().solution
    best_found = given
    if rough is not None:
        found = _with_order(problem, units, devices_of(problem, rough.stages))
        if found is not None and found.better_than(given):
            best_found = found
    bound = max(bound, outcome.lower_bound)
    return best_found and dataclasses.replace(best_found, lower_bound=bound, exact=False)


def _best_of(problem: PartitionProblem, units: Units, orders: Sequence[Sequence[int]]) -> _Found | None:
    """Return the best of all orders, the first of equal ones."""
    best: _Found | None = None
    bound, exact = np.inf, True
    for order in orders:
        found = _with_order(problem, units, order)
        if found is not None:
            bound, exact = min(bound, found.lower_bound), exact and found.exact
            if found.better_than(best):
                best = found
    return best and dataclasses.replace(best, lower_bound=bound, exact=exact)


def _are_few(problem: PartitionProblem) -> bool:
    orders = 1 if problem.order_is_fixed else math.perm(len(problem.seconds), problem.servers)
    return math.comb(len(problem.cuts), problem.stages - 1) * orders <= _ALL


def _best_of_all(problem: PartitionProblem, units: Units) -> _Found | None:
    """Return the best of all cuts and orders, the first of equal ones."""
    given = tuple(range(problem.servers))
    orders = [given] if problem.order_is_fixed else itertools.permutations(range(len(problem.seconds)), len(given))
    best: tuple[Worth, _Found] | None = None
    for order in orders:
        search = CutSearch(units, problem, stages_on(problem, order))
        ends = search.best_of_all()
        if ends is not None and (best is None or search.worth(ends).better_than(best[0])):
            best = (search.worth(ends), _of_cuts(search, ends, order, 0.0))
    return None if best is None else dataclasses.replace(best[1], lower_bound=best[1].slowest, exact=True)


def _searched_order(problem: PartitionProblem, units: Units) -> list[int]:
    """Return a good order, by cuts out of a part of the possible ones."""
    coarse, _ = _coarse_for_orders(problem, units)
    windows = Windows(coarse)

    def slowest(order: Sequence[int], least: float) -> float:
        search = StageSearch(coarse, StateGraph.of_order(stages_on(problem, order)), windows=windows)
        if np.isfinite(least):
            return search.below(least)
        solution = search.solve().solution
        return solution.slowest if solution else np.inf

    def busiest(order: Sequence[int], least: float) -> float:
        search = CutSearch(coarse, problem, stages_on(problem, order))
        found = search.balanced(rounds=1)
        return max(search.server_seconds(found[0])) if found else np.inf

    if problem.one_stage_each:
        return search_order(problem, slowest, _ORDERS)
    return search_order(problem, busiest, _ORDERS_OF_SEVERAL)


def _coarse_for_orders(problem: PartitionProblem, units: Units) -> tuple[Units, list[int]]:
    return units.coarse(max(_ORDER_CUTS, _CUTS_A_STAGE * problem.stages))


def _with_order(problem: PartitionProblem, units: Units, devices: Sequence[int]) -> _Found | None:
    """Return the best cuts for devices in this order; its lower bound and whether it is exact are of this order."""
    if not problem.one_stage_each:
        return _several_each(problem, units, devices)
    graph = StateGraph.of_order(stages_on(problem, devices))
    outcome = StageSearch(units, graph).solve()
    if not outcome.too_much:
        return None if outcome.solution is None else _of_solution(outcome.solution, devices)
    for count in _COARSE:
        coarse, places = units.coarse(max(count, _CUTS_A_STAGE * problem.stages))
        solution = StageSearch(coarse, graph).solve().solution
        if solution is not None:
            search = CutSearch(units, problem, stages_on(problem, devices))
            bound = max(outcome.lower_bound, lower_bound(problem, units))
            return _of_cuts(search, search.improved([places[end] for end in solution.ends]), devices, bound)
    return None


def _several_each(problem: PartitionProblem, units: Units, devices: Sequence[int]) -> _Found | None:
    """Return good cuts for devices that have several stages each; None if none were found that fit."""
    search = CutSearch(units, problem, stages_on(problem, devices))
    bound = lower_bound(problem, units)
    coarse, places = units.coarse(max(_COARSE[-1], _CUTS_A_STAGE * problem.stages))
    best: tuple[Worth, list[int]] | None = None
    for shared_limit in (True, False):
        rough = CutSearch(coarse, problem, stages_on(problem, devices, shared_limit=shared_limit)).balanced()
        starts = [[places[end] for end in ends] for ends in rough[:_STARTS]]
        if not starts and not shared_limit:
            starts = [least_excess(units, stages_on(problem, devices))]
        for start in starts:
            ends = search.improved(start)
            worth = search.worth(ends)
            if worth.excess == 0 and (best is None or worth.better_than(best[0])):
                best = (worth, ends)
        if best is not None:
            return _of_cuts(search, best[1], devices, bound)
    return None


def _of_solution(solution: Solution, devices: Sequence[int]) -> _Found:
    return _Found(solution.ends, devices, solution.slowest, solution.sent_bytes, solution.slowest, exact=True)


def _of_cuts(search: CutSearch, ends: Sequence[int], devices: Sequence[int], bound: float) -> _Found:
    slowest = max(search.server_seconds(ends))
    return _Found(ends, devices, slowest, search.sent_bytes(ends), bound, exact=slowest <= bound * (1 + _EQUAL))


def check_stage_count(stages: int, cuts: Sequence[int]) -> None:
    """PlanError if a graph with these allowed cuts cannot have so many stages."""
    if stages > len(cuts) + 1:
        raise PlanError(
            f"The model cannot be cut into {stages} stages",
            expected=f"at most {len(cuts) + 1} stages: its graph can be cut at {len(cuts)} places",
            got=f"{stages} stages",
            remedy=f"set stages to {len(cuts) + 1} or less",
        )


def check_cuts(chosen: Sequence[int], stages: int, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return the cuts that a user chose; PlanError unless they are ascending, allowed, and one fewer than stages."""
    if len(chosen) != stages - 1:
        raise PlanError(
            "The number of cuts does not fit the number of stages",
            expected=f"{stages - 1} cuts for {stages} stages",
            got=f"{len(chosen)} cuts: {list(chosen)[:20]}",
            remedy="leave cuts empty to have them balanced",
        )
    if any(a >= b for a, b in itertools.pairwise(chosen)):
        raise PlanError(
            "Cuts must ascend, so that every stage has a node", expected="ascending", got=str(list(chosen)[:20])
        )
    for cut in chosen:
        if cut not in cuts:
            below = max((allowed for allowed in cuts if allowed < cut), default=None)
            above = min((allowed for allowed in cuts if allowed > cut), default=None)
            near = [str(allowed) for allowed in (below, above) if allowed is not None]
            raise PlanError(
                f"The graph cannot be cut at node {cut}",
                expected="a position where no in-place operator, tuple or buffer that changes is split",
                got=str(cut),
                remedy=f"the nearest allowed: {' and '.join(near) or 'none'}; or leave cuts empty",
            )
    return tuple(chosen)
