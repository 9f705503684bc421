"""Cuts a model's graphs into segments, one a stage and graph, with each value's route and each tensor's place.

Pure. Leaves to others: choosing the train graph's cuts (`partition.py`), and which server hosts a stage (`layout.py`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from gradwire_coordinator.costs import Rates, node_seconds
from gradwire_coordinator.graph_index import GraphIndex, can_travel, learned_values, read_values
from gradwire_coordinator.model_checks import IndexedModel
from gradwire_coordinator.ownership import cuts_by_ownership
from gradwire_coordinator.placement import Placement
from gradwire_protocol.errors import ModelError
from gradwire_protocol.optimizer_state import tensor_bytes
from gradwire_protocol.v1 import graph_pb2, stage_pb2


@dataclass(frozen=True)
class Segments:
    """A model, cut up."""

    # By stage: its segments, at most one a graph, train first. A stage without nodes in a graph has none there.
    stages: tuple[tuple[stage_pb2.Segment, ...], ...]
    # Every tensor that some graph uses, in the model's order.
    placements: tuple[stage_pb2.TensorPlacement, ...]
    # By graph: the positions at which it is cut, stages − 1 of them.
    cuts: dict[graph_pb2.GraphKind, tuple[int, ...]]

    def of_graph(self, kind: graph_pb2.GraphKind) -> dict[int, stage_pb2.Segment]:
        """Return the segments of one graph, by stage."""
        return {segment.stage: segment for segments in self.stages for segment in segments if segment.graph == kind}

    def held_by(self, server: int, server_of: Placement) -> list[stage_pb2.TensorPlacement]:
        """Return the tensors that a server holds for its stages, each once."""
        return [item for item in self.placements if any(server_of[stage] == server for stage in item.holder_stages)]

    def tied_servers(self, server_of: Placement) -> frozenset[int]:
        """Return the servers that hold a copy of a trained parameter that others hold too."""
        holders = [
            {server_of[stage] for stage in placement.holder_stages}
            for placement in self.placements
            if placement.spec.requires_grad
        ]
        return frozenset(server for servers in holders if len(servers) > 1 for server in servers)


def make_segments(
    indexed: IndexedModel,
    train_cuts: Sequence[int],
    rows: int,
    rates: Rates,
    spread: Mapping[graph_pb2.GraphKind, Mapping[str, int]] = MappingProxyType({}),
) -> Segments:
    """Cut all graphs of a model, the train graph at `train_cuts`, the others where their tensors are.

    `rows` of a micro-batch and `rates` of a typical device weigh what is left open. `spread`: by graph, the values of
    which each shard sends a part only, with the dimension. ModelError if a value crosses a cut that cannot travel;
    PlanError if a buffer that changes would be read by two stages.
    """
    stages = len(train_cuts) + 1
    holders: dict[str, set[int]] = {}
    by_stage: list[list[stage_pb2.Segment]] = [[] for _ in range(stages)]
    cuts: dict[graph_pb2.GraphKind, tuple[int, ...]] = {}
    shares = _shares(indexed.train, train_cuts, rows, rates)
    parameters = {name for name, spec in indexed.tensors.items() if spec.kind == graph_pb2.TENSOR_KIND_PARAMETER}
    for kind, index in indexed.graphs.items():
        if kind == graph_pb2.GRAPH_KIND_TRAIN:
            cuts[kind] = tuple(train_cuts)
        else:
            cuts[kind] = cuts_by_ownership(
                index,
                index.usable_cuts(indexed.mutated),
                holders,
                {name: tensor_bytes(spec) for name, spec in indexed.tensors.items()},
                indexed.mutated,
                stages,
                _distance(index, shares, rows, rates),
            )
        learned = learned_values(index, parameters)
        cut = _Cut(index, cuts[kind], indexed.model.loss_form, holders, learned, spread.get(kind, {}))
        for stage in range(stages):
            segment = cut.segment(stage)
            if segment is not None:
                by_stage[stage].append(segment)
    placements = tuple(
        stage_pb2.TensorPlacement(spec=spec, holder_stages=sorted(holders[name]))
        for name, spec in indexed.tensors.items()
        if name in holders
    )
    return Segments(tuple(map(tuple, by_stage)), placements, cuts)


class _Cut:
    """One graph with its cuts. Adds to `holders` the stages that its tensors are needed on."""

    def __init__(
        self,
        index: GraphIndex,
        cuts: Sequence[int],
        loss_form: graph_pb2.LossForm,
        holders: dict[str, set[int]],
        learned: frozenset[str],
        spread: Mapping[str, int],
    ) -> None:
        self._index = index
        self._spread = spread
        self._learned = learned
        self._cuts = cuts
        self._last = len(cuts)
        outputs = [output.value for output in index.graph.outputs]
        with_loss = index.graph.kind != graph_pb2.GRAPH_KIND_PREDICT
        self._loss = outputs[0] if with_loss else ""
        self._loss_weight = outputs[1] if with_loss and loss_form == graph_pb2.LOSS_FORM_SUM_AND_WEIGHT else ""
        # Value -> stages that read it, ascending; the loss and its weight are read by the last stage.
        self._readers = {
            value: sorted({self._stage_of(position) for position in positions})
            for value, positions in index.readers.items()
        }
        for value, readers in self._readers.items():
            if value in index.tensors:
                holders.setdefault(index.tensors[value], set()).update(readers)
        for update in index.graph.buffer_updates:
            holders.setdefault(update.tensor, set()).add(self._stage_of(index.producers[update.value]))
        self._results = {} if with_loss else self._place_results(outputs, holders)

    def _stage_of(self, position: int) -> int:
        if position >= len(self._index.graph.nodes):
            return self._last
        return bisect.bisect_right(self._cuts, position)

    def _place_results(self, outputs: Sequence[str], holders: dict[str, set[int]]) -> dict[str, int]:
        """Return the stage that delivers each output: its maker, its holder, or the first that reads it."""
        stages: dict[str, int] = {}
        for value in outputs:
            if value in self._index.producers:
                stages[value] = self._stage_of(self._index.producers[value])
            elif value in self._index.tensors:
                holding = holders.setdefault(self._index.tensors[value], set())
                stages[value] = min(holding, default=0)
                holding.add(stages[value])
            elif value:
                stages[value] = min(self._readers.get(value, [0]))
        return stages

    def segment(self, stage: int) -> stage_pb2.Segment | None:
        """Return the segment of a stage; None if it has nothing to do in this graph."""
        index, graph = self._index, self._index.graph
        first = self._cuts[stage - 1] if stage > 0 else 0
        end = self._cuts[stage] if stage < self._last else len(graph.nodes)
        nodes = graph.nodes[first:end]
        results = [value for value, place in self._results.items() if place == stage]
        ends_here = stage == self._last and bool(self._loss)
        if not nodes and not results and not ends_here:
            return None
        read = dict.fromkeys(value for node in nodes for value in read_values(node))
        read.update(dict.fromkeys(value for value in results if value not in index.producers))
        if ends_here:
            read.update(dict.fromkeys(value for value in (self._loss, self._loss_weight) if value))
        made = {node.name for node in nodes}
        uses = [use for use in graph.tensors if use.value in read]
        updates = [update for update in graph.buffer_updates if update.value in made]
        held = {use.tensor for use in uses} | {update.tensor for update in updates}
        return stage_pb2.Segment(
            stage=stage,
            graph=graph.kind,
            nodes=nodes,
            tensors=uses,
            incoming=[
                self._incoming(value, stage) for value in read if value not in made and value not in index.tensors
            ],
            outgoing=[
                stage_pb2.OutgoingValue(
                    value=node.name,
                    consumer_stages=consumers,
                    exact=node.name not in self._learned,
                    spread_dimension=self._spread.get(node.name),
                )
                for node in nodes
                if (consumers := self._consumers(node.name, stage))
            ],
            buffer_updates=updates,
            mutated_tensors=[tensor for tensor in graph.mutated_tensors if tensor in held],
            mutated_inputs=[value for value in graph.mutated_inputs if value in read],
            loss=self._loss if ends_here else "",
            loss_weight=self._loss_weight if ends_here else "",
            results=[stage_pb2.ResultValue(value=value) for value in results],
        )

    def _consumers(self, value: str, producer: int) -> list[int]:
        return [stage for stage in self._readers.get(value, ()) if stage != producer]

    def _incoming(self, value: str, stage: int) -> stage_pb2.IncomingValue:
        index = self._index
        if value in index.inputs:
            return stage_pb2.IncomingValue(value=value, from_batch=True)
        if not can_travel(index.spec(value)):
            raise ModelError(
                f"In the {index.name} graph, {value} crosses the cut before stage {stage}, but cannot travel",
                expected="tensors and numbers only",
                got=graph_pb2.ValueKind.Name(index.spec(value).kind),
                remedy="this is a fault of the graph's allowed cuts: please report it with the model",
            )
        producer = self._stage_of(index.producers[value])
        consumers = self._consumers(value, producer)
        place = consumers.index(stage)
        incoming = stage_pb2.IncomingValue(
            value=value,
            producer_stage=producer,
            gradient_to_stage=consumers[place - 1] if place else producer,
            spread_dimension=self._spread.get(value),
        )
        if place + 1 < len(consumers):
            incoming.gradient_from_stage = consumers[place + 1]
        return incoming


def _shares(index: GraphIndex, cuts: Sequence[int], rows: int, rates: Rates) -> list[float]:
    """Return which share of a graph's seconds lies before each cut."""
    running = np.concatenate([[0.0], np.cumsum(node_seconds(index.graph.nodes, rows, [rates])[0])])
    return [float(running[cut] / running[-1]) for cut in cuts]


def _distance(index: GraphIndex, shares: Sequence[float], rows: int, rates: Rates) -> Callable[[int, int], float]:
    """Return a function (stage, cut): how many seconds a cut is away from where the stage's share ends."""
    running = np.concatenate([[0.0], np.cumsum(node_seconds(index.graph.nodes, rows, [rates])[0])])

    def distance(stage: int, cut: int) -> float:
        return abs(float(running[cut] - shares[stage] * running[-1]))

    return distance
