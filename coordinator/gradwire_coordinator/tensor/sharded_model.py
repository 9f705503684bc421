"""A model for stages of several servers each: its graphs rewritten, its tensors with their parts.

Pure. Leaves to others: the rules of operators, and all that comes after: the rewritten model is planned as any other.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

from gradwire_coordinator.costs import trained_tensors
from gradwire_coordinator.graph_index import GraphIndex, index_graph, learned_values
from gradwire_coordinator.model_checks import IndexedModel
from gradwire_coordinator.tensor.auto_plan import look_for_splits
from gradwire_coordinator.tensor.rewriter import Rewriter, Rewritten
from gradwire_coordinator.tensor.rules import RULES
from gradwire_coordinator.tensor.tensor_plan import WHOLE, TensorPlan, matched
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import graph_pb2, run_pb2


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedModel:
    """A model for so many servers a stage."""

    # Rewritten; the model that was given, where there is one server.
    indexed: IndexedModel
    shards: int
    # Parameter -> "column", "row" or "vocab"; biases go with their weights.
    splits: Mapping[str, str]
    # By graph: values of which each server has a part only. They travel as they are.
    parts: Mapping[graph_pb2.GraphKind, frozenset[str]]
    # By graph: of values that all servers have, the dimension along which each can send a part of them.
    spread: Mapping[graph_pb2.GraphKind, Mapping[str, int]]
    # Of each position in the given training graph: where it is in the rewritten one.
    starts: tuple[int, ...]

    def new_cut(self, cut: int) -> int:
        """Return the position in the rewritten training graph for one in the given one."""
        return self.starts[cut] if 0 <= cut < len(self.starts) else cut

    def old_cut(self, cut: int) -> int:
        """Return the position in the given training graph for one in the rewritten one."""
        return bisect.bisect_right(self.starts, cut) - 1


def shard_model(indexed: IndexedModel, plan: run_pb2.Plan) -> ShardedModel:
    """Return a model as the servers of a plan run it; PlanError where it cannot be shared as the plan wants it."""
    shards = max(1, plan.tensor)
    if shards == 1:
        return ShardedModel(
            indexed=indexed,
            shards=1,
            splits={},
            parts={},
            spread={},
            starts=tuple(range(len(indexed.train.graph.nodes) + 1)),
        )
    tensors = indexed.tensors
    trained = trained_tensors(tensors)
    wanted, looks = matched(plan.tensor_plan, tensors)
    splits = TensorPlan(indexed.train, tensors, shards)
    biases = {use.bias for uses in splits.uses.values() for use in uses if use.bias}
    for name, split in wanted.items():
        # A bias goes with its weight, whether or not a pattern matches it too.
        if split != WHOLE and name not in biases:
            splits.add(name, split)
    obstacle = None
    if looks:
        obstacle = look_for_splits(splits, indexed.train, tensors, learned_values(indexed.train, trained), set(wanted))
    if not splits.splits:
        raise PlanError(
            f"The model has nothing that {shards} tensor-parallel servers could share",
            expected="a product whose outputs stay split until another one takes them up, or rules in tensor_plan",
            got=_why_nothing(looks, obstacle),
            remedy="give tensor_plan, or use stages and replicas, and leave tensor at 1",
        )
    rewritten = {
        kind: Rewriter(
            index, tensors, shards, RULES, splits.part_of, splits.suggest, learned_values(index, trained)
        ).run()
        for kind, index in indexed.graphs.items()
    }
    made = _model(indexed, splits, rewritten)
    return ShardedModel(
        indexed=made,
        shards=shards,
        splits=dict(splits.splits),
        parts={kind: each.parts for kind, each in rewritten.items()},
        spread={kind: _spread(index, rewritten[kind].parts, shards) for kind, index in made.graphs.items()},
        starts=rewritten[graph_pb2.GRAPH_KIND_TRAIN].starts,
    )


def _why_nothing(looks: bool, obstacle: PlanError | None) -> str:
    if not looks:
        return "rules that leave everything whole"
    return "no such pair of products" if obstacle is None else obstacle.message


def _model(
    indexed: IndexedModel, splits: TensorPlan, rewritten: Mapping[graph_pb2.GraphKind, Rewritten]
) -> IndexedModel:
    model = graph_pb2.Model(loss_form=indexed.model.loss_form, operators=indexed.model.operators)
    for spec in indexed.model.tensors:
        local = model.tensors.add()
        local.CopyFrom(spec)
        part = splits.parts.get(spec.name)
        if part is not None:
            local.shape[part.dim] //= splits.shards
            local.split.CopyFrom(graph_pb2.TensorSplit(dimension=part.dim, sections=part.sections))
    tensors = {spec.name: spec for spec in model.tensors}
    found: dict[graph_pb2.GraphKind, GraphIndex] = {}
    for kind, index in indexed.graphs.items():
        graph: graph_pb2.Graph = getattr(model, index.name)
        graph.CopyFrom(rewritten[kind].graph)
        found[kind] = index_graph(graph, index.name, tensors)
    return IndexedModel(
        model=model,
        tensors=tensors,
        train=found[graph_pb2.GRAPH_KIND_TRAIN],
        evaluate=found[graph_pb2.GRAPH_KIND_EVALUATE],
        predict=found.get(graph_pb2.GRAPH_KIND_PREDICT),
        operators=indexed.operators,
    )


def _spread(index: GraphIndex, parts: frozenset[str], shards: int) -> dict[str, int]:
    """Return the last dimension of each whole tensor that every server can take an equal part of."""
    found = {}
    for node in index.graph.nodes:
        if node.output.kind != graph_pb2.VALUE_KIND_TENSOR or node.name in parts:
            continue
        dims = [
            dim
            for dim, size in enumerate(node.output.shape)
            if not size.per_row and size.fixed >= shards and size.fixed % shards == 0
        ]
        if dims:
            found[node.name] = dims[-1]
    return found
