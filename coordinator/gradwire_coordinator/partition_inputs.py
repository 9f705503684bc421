"""What a plan asks of the partition: the problem of cutting a model for servers, and others that may fit.

Pure. Leaves to others: where costs come from (`costs.py`), and solving the problem (`partition.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradwire_coordinator.boundaries import ASSUMED_LINK, Links
from gradwire_coordinator.costs import NodeCosts, TravellingValue, rows_per_micro_batch, travelling_values
from gradwire_coordinator.fit_errors import Alternative
from gradwire_coordinator.graph_index import value_bytes
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.named_schedules import AUTO, placements
from gradwire_coordinator.optimizer_costs import OptimizerCosts
from gradwire_coordinator.partition_problem import Floats, HeldTensor, PartitionProblem
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.programs import ChosenSchedule, recomputing_stages
from gradwire_coordinator.schedules import Programs
from gradwire_coordinator.tensor.sharded_model import ShardedModel
from gradwire_protocol.program import BACKWARD, FORWARD, INPUT_GRADIENT
from gradwire_protocol.v1 import graph_pb2, run_pb2

# Measurements of like links differ by less.
_LIKE_LINKS = 2.0
# By how much more stages or micro-batches are tried.
_FACTORS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True, eq=False)
class PartitionInputs:
    """What there is to cut a model for. Sequences go by server, as given; 0 bytes of memory: not known."""

    plan: run_pb2.Plan
    optimizer: OptimizerCosts
    sharded: ShardedModel
    costs: Sequence[NodeCosts]
    memory_bytes: Sequence[int]
    links: Links
    # Whether servers must stay at their positions.
    order_is_fixed: bool = False

    def programs(self, placement: Placement) -> Programs:
        """Return the programs that decide what is held; of "auto" those that a named schedule would have."""
        name = self.plan.schedule
        if name == AUTO and list(placement) == list(range(len(placement))):
            # The warm-up is as deep as there is memory for.
            name = "1f1b"
        return ChosenSchedule(name, placement).programs(min(self.plan.micro_batches, self.plan.expected_rows))

    def problem(self, placement: Placement) -> PartitionProblem:
        """Return the problem of cutting the model for a placement."""
        rows, index = self.costs[0].rows, self.sharded.indexed.train
        spread = self.sharded.spread.get(graph_pb2.GRAPH_KIND_TRAIN, {})
        programs = self.programs(placement)
        last = len(index.graph.nodes) - 1
        rates, delays = _rates(self.links, len(self.costs))
        return PartitionProblem(
            seconds=np.stack([each.seconds() for each in self.costs]),
            forward_seconds=np.stack([each.forward for each in self.costs]),
            cuts=index.usable_cuts(self.sharded.indexed.mutated),
            placement=placement,
            values=travelling_values(index, rows, spread, self.sharded.shards),
            inputs=[
                TravellingValue(0, tuple(min(position, last) for position in read), value_bytes(entry.spec, rows), 0)
                for name, entry in index.inputs.items()
                if (read := index.readers.get(name, ()))
            ],
            tensors=self._tensors(last),
            # Of several makes, what the most demanding one keeps.
            held_bytes=np.stack([each.held_bytes for each in self.costs]).max(axis=0),
            live=live_micro_batches(programs, placement),
            recomputes=recomputing_stages(programs) if self.plan.recompute else (),
            memory_bytes=self.memory_bytes,
            link_bytes_per_second=rates,
            link_delay_seconds=delays,
            order_is_fixed=self.order_is_fixed,
        )

    def alternatives(self, placement: Placement) -> list[Alternative]:
        """Return what may fit where this does not: running forwards again, smaller micro-batches, more stages."""
        plan = self.plan
        found = []
        if plan.schedule != AUTO:
            places = placements(AUTO, plan.stages, plan.virtual_stages)[0]
            found.append(
                Alternative("another schedule", 'set schedule="auto"', _of(self._changed(schedule=AUTO), places))
            )
        if not plan.recompute:
            again = self._changed(recompute=True)
            found.append(Alternative("recomputation", "set recompute=True", _of(again, placement)))
        for count in dict.fromkeys(min(plan.expected_rows, factor * plan.micro_batches) for factor in _FACTORS):
            if count > plan.micro_batches:
                smaller = _of(self._smaller(count), placement)
                remedy = f"use {count * plan.replicas} micro-batches"
                found.append(Alternative("smaller micro-batches", remedy, smaller))
        indexed = self.sharded.indexed
        pieces = len(indexed.train.usable_cuts(indexed.mutated)) + 1
        for stages in dict.fromkeys([plan.stages + 1, *(factor * plan.stages for factor in _FACTORS)]):
            if stages * plan.virtual_stages <= pieces:
                places = placements(plan.schedule, stages, plan.virtual_stages)[0]
                more = (stages - plan.stages) * plan.replicas * self.sharded.shards
                remedy = f"use {stages} stages, on {more} more such server{'s' if more > 1 else ''}"
                found.append(Alternative("more stages", remedy, _of(self._on_more(stages), places)))
        return found

    def _tensors(self, last: int) -> list[HeldTensor]:
        found = []
        indexed = self.sharded.indexed
        for name, positions in indexed.train.tensor_positions().items():
            if positions:
                held = self.optimizer.held([indexed.tensors[name]])
                read = tuple(dict.fromkeys(min(position, last) for position in positions))
                found.append(HeldTensor(read, held.weights, held.gradients, held.optimizer))
        return found

    def _changed(self, **fields: object) -> PartitionInputs:
        plan = run_pb2.Plan()
        plan.CopyFrom(self.plan)
        for name, value in fields.items():
            setattr(plan, name, value)
        return replace(self, plan=plan)

    def _smaller(self, micro_batches: int) -> PartitionInputs:
        """Return these with more micro-batches, and so fewer rows in each. What is kept goes by rows."""
        rows = rows_per_micro_batch(self.plan.expected_rows, micro_batches)
        costs = [
            replace(each, rows=rows, held_bytes=np.ceil(each.held_bytes * (rows / each.rows)).astype(np.int64))
            for each in self.costs
        ]
        return replace(self._changed(micro_batches=micro_batches), costs=costs)

    def _on_more(self, stages: int) -> PartitionInputs:
        """Return these on more servers: such as the first."""
        more = stages - len(self.costs)
        return replace(
            self._changed(stages=stages),
            costs=[*self.costs, *[self.costs[0]] * more],
            memory_bytes=[*self.memory_bytes, *[self.memory_bytes[0]] * more],
        )


def live_micro_batches(programs: Programs, placement: Placement) -> list[int]:
    """Return how many micro-batches each stage holds when its server holds the most."""
    live = [0] * len(placement)
    for program in programs:
        now: dict[int, int] = {}
        most = 0
        for action in program:
            if action.kind == FORWARD:
                now[action.stage] = now.get(action.stage, 0) + 1
                if sum(now.values()) > most:
                    most = sum(now.values())
                    for stage, count in now.items():
                        live[stage] = count
            elif action.kind in (BACKWARD, INPUT_GRADIENT):
                now[action.stage] -= 1
    return [max(1, count) for count in live]


def _of(inputs: PartitionInputs, placement: Placement) -> Callable[[], PartitionProblem]:
    return lambda: inputs.problem(placement)


def _rates(links: Links, servers: int) -> tuple[float | Floats, float]:
    """Return (bytes a second, delay) of links, for the partition.

    Like ones, up to the noise of measurements, count as equal, so that the order of servers does not hang on it. Where
    they differ, one that was not measured is taken to be as slow as the slowest.
    """
    known = {ends: rate for ends, rate in links.items() if isinstance(rate, LinkRate)}
    if not known:
        return ASSUMED_LINK.forward, 0.0
    both = [speed for rate in known.values() for speed in (rate.forward, rate.backward)]
    if max(both) <= min(both) * _LIKE_LINKS:
        return float(np.median(both)), 0.0
    rates = np.full((servers, servers), min(both))
    for (first, second), rate in known.items():
        rates[first, second], rates[second, first] = rate.forward, rate.backward
    return rates, 0.0
