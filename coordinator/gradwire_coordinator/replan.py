"""Plans a run anew from what its steps have taken, and says which of its state then moves.

Pure. A server that takes longer for its work than predicted is taken to be slower by that factor in all that it could
do: forwards and backwards apart. Servers keep their places in the pipeline, so that only what is near a cut moves. Of
those that wait for each other at every exchange of a tensor group, the slowest counts for all; what exchanges take is
what was measured before the run.

Leaves to others: collecting the measurements and carrying the new plan out (`replanner.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from gradwire_coordinator.costs import MEASURED, NodeCosts
from gradwire_coordinator.group_costs import exchanges_of, with_exchanges, without_exchanges
from gradwire_coordinator.layout import Layout
from gradwire_coordinator.planner import PlannedRun, plan_run
from gradwire_coordinator.registry import Server
from gradwire_coordinator.step_costs import stage_seconds
from gradwire_coordinator.ways import Division, Servers
from gradwire_protocol.dealing import deal
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import run_pb2, stage_pb2

# The newest steps that count.
_MOST_STEPS = 50
# Of the busiest server's work, what every other is taken to have done, too.
_ALSO_DONE = 0.1
_FORWARD, _BACKWARD = ("forward",), ("backward", "weight")


class Work(NamedTuple):
    """Seconds that a unit computes in a step: forwards, and backwards with the gradients of weights."""

    forward: float
    backward: float


@dataclass(eq=False)
class Basis:
    """What a run is planned from, and what the steps of its present layout have taken: by unit, for each step."""

    request: pb.CreateRunRequest
    planned: PlannedRun
    layout: Layout
    steps: deque[list[Work]] = field(default_factory=lambda: deque(maxlen=_MOST_STEPS))
    warm: bool = False

    def take(self, step: run_pb2.TrainStep, result: run_pb2.EntryResult) -> None:
        """Take in a finished step, as if it had had the expected rows. The first one warms up, and does not count."""
        if not self.warm:
            self.warm = True
            return
        share = self.request.plan.expected_rows / sum(part.rows for part in step.micro_batches)

        def seconds(server: Server, phases: Sequence[str]) -> float:
            busy = result.timings[server.server].busy_seconds
            return share * sum(busy.get(phase, 0.0) for phase in phases)

        self.steps.append(
            [
                Work(*(max(seconds(server, phases) for server in unit) for phases in (_FORWARD, _BACKWARD)))
                for unit in self.planned.units
            ]
        )


@dataclass(frozen=True)
class NewLayout:
    """The best plan by what steps have taken, beside the one that they were taken with; seconds are of a step."""

    planned: PlannedRun
    seconds_before: float
    seconds_after: float
    differs: bool

    def pays(self, minimum_gain: float) -> bool:
        """Whether it is another layout, and saves at least such a share of a step."""
        return self.differs and self.seconds_after <= self.seconds_before * (1.0 - minimum_gain)


def plan_anew(basis: Basis) -> NewLayout:
    """Return the best layout on the same servers, with cuts where they are best. PlanError if nothing was measured."""
    if basis.request.plan.replicas > 1 and basis.planned.cut.sharing.exchange.has_servers:
        raise PlanError(
            "A run whose replicas agree by parameter servers cannot be planned anew",
            expected='replicas with exchange="ring" or "local"',
            got=f"exchange={basis.request.plan.exchange!r}; the run goes on as it is laid out",
            remedy="save a checkpoint, and load it into a new run, which is planned from the present speeds",
        )
    if not basis.steps:
        raise PlanError(
            "No training step of this layout was measured, so there is nothing to plan anew from",
            expected="two training steps at least: the first one warms up, and does not count",
            remedy="train some steps first",
        )
    planned, known = basis.planned, _as_measured(basis)
    plan = basis.request.plan
    present = Division(planned.schedule.placement, planned.cut.way.cuts)
    before = plan_run(_asked(basis.request, planned.schedule.name), planned.sharded, planned.units, known, present)
    after = plan_run(_asked(basis.request, plan.schedule), planned.sharded, planned.units, known)
    return NewLayout(
        planned=after,
        seconds_before=before.prediction.seconds * _detour(plan, planned.shares, before.shares),
        seconds_after=after.prediction.seconds,
        differs=_identity(plan, after) != _identity(plan, planned),
    )


def _dealt(plan: run_pb2.Plan, shares: Sequence[float]) -> list[int]:
    """Return the replica of each micro-batch of a step."""
    return deal(min(plan.micro_batches, plan.expected_rows), shares)


def _detour(plan: run_pb2.Plan, shares: Sequence[float], speeds: Sequence[float]) -> float:
    """Return by how much longer a step takes whose micro-batches are dealt out by these shares, and not by speed.

    speeds: of the replicas, adding up to 1.
    """

    def seconds(shares: Sequence[float]) -> float:
        counts = Counter(_dealt(plan, shares))
        return max(counts[replica] / speed for replica, speed in enumerate(speeds))

    return max(1.0, seconds(shares) / seconds(speeds))


def reload_plan(planned: PlannedRun) -> run_pb2.NewPlan:
    """Return the entry of a layout that gets its state from a checkpoint."""
    return _entry(planned, reloads=True)


def new_plan(
    planned: PlannedRun, before: Layout, after: Layout, replies: Sequence[stage_pb2.PrepareReply]
) -> run_pb2.NewPlan:
    """Return the entry that moves the state. replies: of the servers, in the order of `after`."""
    held = {server.server: frozenset(server.tensors) for server in before.for_client}
    states: dict[tuple[str, str], list[str]] = {}
    for server, reply in zip(after.servers, replies, strict=True):
        for item in reply.optimizer_state:
            states.setdefault((server.server, item.parameter), []).append(item.state)
    moves = []
    for to in after.for_client:
        for tensor in to.tensors:
            if tensor in held[to.server]:
                continue
            source = next(server.server for server in before.for_client if tensor in held[server.server])
            moves.append(
                run_pb2.Move(
                    tensor=tensor,
                    from_server=source,
                    to_server=to.server,
                    states=states.get((source, tensor), ()),
                )
            )
    return _entry(planned, moves=moves)


def _entry(planned: PlannedRun, *, moves: Sequence[run_pb2.Move] = (), reloads: bool = False) -> run_pb2.NewPlan:
    return run_pb2.NewPlan(
        servers=[server.server for server in planned.servers],
        cuts=planned.cut.way.cuts,
        placement=planned.schedule.placement,
        schedule=planned.schedule.name,
        extra_warm_up=planned.schedule.extra_warm_up,
        moves=moves,
        reloads=reloads,
    )


def _identity(plan: run_pb2.Plan, planned: PlannedRun) -> tuple[object, ...]:
    """What makes it another layout if it changes: where state is, and which replica takes which micro-batch."""
    return planned.cut.way.cuts, planned.schedule.placement, _dealt(plan, planned.shares)


def _asked(request: pb.CreateRunRequest, schedule: str) -> pb.CreateRunRequest:
    """Return what is asked for now: the user's own cuts do not hold any more; the kind of schedule does."""
    asked = pb.CreateRunRequest()
    asked.CopyFrom(request)
    del asked.plan.cuts[:]
    asked.plan.schedule = schedule
    return asked


def _as_measured(basis: Basis) -> Servers:
    """Return what is known of the units, with their costs multiplied by how much longer their steps took.

    In their order: position by position, one replica after the other.
    """
    computed = _computed(basis.planned)
    predicted = _predicted(basis, computed)
    measured = [
        Work(*(median(step[unit][part] for step in basis.steps) for part in range(len(Work._fields))))
        for unit in range(len(predicted))
    ]
    if basis.request.plan.recompute:
        # Forwards that are run again count as forward where measured, and as backward where predicted.
        factors = [Work(factor, factor) for factor in _factors([*map(sum, measured)], [*map(sum, predicted)])]
    else:
        factors = [
            Work(*pair)
            for pair in zip(
                _factors([each.forward for each in measured], [each.forward for each in predicted]),
                _factors([each.backward for each in measured], [each.backward for each in predicted]),
                strict=True,
            )
        ]
    planned = basis.planned
    costs = [_scaled(known, own) for known, own in zip(itertools.cycle(computed), factors, strict=False)]
    if planned.known.groups:
        exchanges = exchanges_of(planned.sharded, costs[0].rows)
        costs = [with_exchanges(each, exchanges, link) for each, link in zip(costs, planned.known.groups, strict=True)]
    servers = planned.cut.servers if basis.request.plan.replicas == 1 else planned.known
    return dataclasses.replace(servers, costs=costs, order_is_fixed=True)


def _computed(planned: PlannedRun) -> list[NodeCosts]:
    """Return what nodes cost at each position, without exchanges: what these take, servers do not compute."""
    servers = planned.cut.servers
    if not servers.groups:
        return list(servers.costs)
    exchanges = exchanges_of(planned.sharded, servers.costs[0].rows)
    return [without_exchanges(each, exchanges, link) for each, link in zip(servers.costs, servers.groups, strict=True)]


def _predicted(basis: Basis, computed: Sequence[NodeCosts]) -> list[Work]:
    """Return what each unit was to compute in a step: of each replica for its share of micro-batches."""
    planned, found = basis.planned, []
    cut = planned.cut
    of_stages = stage_seconds([computed[at] for at in planned.schedule.placement], cut.way.cuts, cut.recomputes)
    counts_of = Counter(_dealt(basis.request.plan, planned.shares))
    for replica in range(len(planned.shares)):
        for program in planned.schedule.programs(counts_of[replica]):
            counts = Counter((action.stage, action.kind) for action in program)
            forward = backward = 0.0
            for (stage, kind), count in counts.items():
                seconds = of_stages[stage]
                if kind == FORWARD:
                    forward += count * seconds.forward
                elif kind == BACKWARD:
                    backward += count * seconds.backward
                elif kind in (INPUT_GRADIENT, WEIGHT_GRADIENT):
                    backward += count * seconds.of[kind]
            found.append(Work(forward, backward))
    return found


def _factors(measured: Sequence[float], predicted: Sequence[float]) -> list[float]:
    """Return by how much longer each server takes for its work than predicted.

    A server that does little says little of what it would take for more: it counts as if it had also done some of what
    the busiest one does, as fast as all of them on the average.
    """
    if not (sum(measured) > 0 and sum(predicted) > 0):
        return [1.0] * len(measured)
    overall = sum(measured) / sum(predicted)
    also = _ALSO_DONE * max(predicted)
    return [(took + overall * also) / (expected + also) for took, expected in zip(measured, predicted, strict=True)]


def _scaled(costs: NodeCosts, factors: Work) -> NodeCosts:
    return dataclasses.replace(
        costs,
        forward=costs.forward * factors.forward,
        input_gradient=costs.input_gradient * factors.backward,
        weight_gradient=costs.weight_gradient * factors.backward,
        source=MEASURED,
    )
