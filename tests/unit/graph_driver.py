"""Runs an exported model as a chain of segments in one process, and the model itself, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gradwire.graph import ExportedModel, Unbatched
from gradwire_coordinator.costs import Rates
from gradwire_coordinator.model_checks import IndexedModel, check_model
from gradwire_coordinator.segments import make_segments
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.group.tensor_group import Shards
from gradwire_stage.segment import BuiltSegment, SegmentPass, Value

CPU = torch.device("cpu")


@dataclass
class Outcome:
    """What one step gives: loss, gradients by tensor name, buffers after it."""

    loss: float
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Shard:
    """What a chain runs: a model and its tensors; the model that was exported, where there is one server a stage."""

    indexed: IndexedModel
    tensors: Mapping[str, torch.Tensor]
    shards: int = 1
    spread: Mapping[graph_pb2.GraphKind, Mapping[str, int]] = field(default_factory=dict)

    def group(self, about: str) -> Shards | None:
        """The servers that run a pass together."""
        return None

    def check_whole(self, group: Shards | None, name: str, value: Value | None) -> None:
        """Look whether all servers have the same."""


class Chain:
    """Stages that hold their own copies of tensors, and send each other dense copies of values."""

    def __init__(
        self,
        exported: ExportedModel,
        cuts: Sequence[int],
        seed: int = 0,
        precision: torch.dtype | None = None,
        recompute: bool = False,
        split: Collection[int] = (),
        shard: Shard | None = None,
    ) -> None:
        """split: the micro-batches whose weight gradients come at the end of a step. shard: as which this runs."""
        self.exported = exported
        self._shard = shard or Shard(check_model(exported.proto), exported.tensors)
        self._split = split
        self._precision = precision
        self._recompute = recompute
        whole = self._shard
        made = make_segments(whole.indexed, cuts, rows=2, rates=Rates(1e9, 1e9), spread=whole.spread)
        self.segments: dict[graph_pb2.GraphKind, list[stage_pb2.Segment]] = {}
        self._built: dict[tuple[int, graph_pb2.GraphKind], BuiltSegment] = {}
        self._seed = seed
        self.stores: list[dict[str, torch.Tensor]] = []
        self.placements = {item.spec.name: list(item.holder_stages) for item in made.placements}
        for stage, segments in enumerate(made.stages):
            held = [name for name, holders in self.placements.items() if stage in holders]
            self.stores.append({name: _own(whole.tensors[name]) for name in held})
            for segment in segments:
                self.segments.setdefault(segment.graph, []).append(segment)

    def train(self, batch: Any, micro_batches: int = 1, step: int = 1) -> Outcome:
        """All forwards, then all backwards; gradients divided once by the total weight."""
        kind = graph_pb2.GRAPH_KIND_TRAIN
        passes, requires, losses, weights, seeds = [], [], [], [], []
        for number, (rows, values) in enumerate(self._micro_batches(batch, kind, micro_batches)):
            made, wanting = self._forward(values, kind, step, number, record=True)
            passes.append(made)
            requires.append(wanting)
            last = made[-1]
            assert last.loss is not None
            losses.append(float(last.loss.detach()))
            summed = self.exported.proto.loss_form == graph_pb2.LOSS_FORM_SUM_AND_WEIGHT
            weights.append(float(last.loss_weight) if summed else float(rows))  # type: ignore[arg-type]
            losses[-1] *= 1.0 if summed else rows
            seeds.append(1.0 if summed else float(rows))
        waiting: list[SegmentPass] = []
        for number, (made, wanting, seed) in enumerate(zip(passes, requires, seeds, strict=True)):
            self._backward(made, wanting, seed, waiting if number in self._split else None, f"{step}/{number}")
        for segment_pass in waiting:
            segment_pass.backward_weight()
        return Outcome(sum(losses) / sum(weights), self._gradients(sum(weights)), self._buffers())

    def built(self, segment: stage_pb2.Segment) -> BuiltSegment:
        """The segment rebuilt, once."""
        key = (segment.stage, segment.graph)
        if key not in self._built:
            store = self.stores[segment.stage]
            self._built[key] = BuiltSegment(segment, store, CPU, self._seed, self._precision, shards=self._shard.shards)
        return self._built[key]

    def evaluate(self, batch: Any) -> float:
        """The mean loss of a batch."""
        ((_, values),) = self._micro_batches(batch, graph_pb2.GRAPH_KIND_EVALUATE, 1)
        made, _ = self._forward(values, graph_pb2.GRAPH_KIND_EVALUATE, 0, 0, record=False)
        assert made[-1].loss is not None
        weight = made[-1].loss_weight
        return float(made[-1].loss) / (1.0 if weight is None else float(weight))

    def predict(self, batch: Any) -> Any:
        """The model's output in its own structure."""
        kind = graph_pb2.GRAPH_KIND_PREDICT
        ((_, values),) = self._micro_batches(batch, kind, 1)
        made, _ = self._forward(values, kind, 0, 0, record=False)
        results = {name: value for item in made for name, value in item.results.items()}
        outputs = self.exported.proto.predict.outputs
        return self.exported.unflatten_output([results[item.value] if item.value else None for item in outputs])

    def _micro_batches(self, batch: Any, kind: graph_pb2.GraphKind, count: int) -> list[tuple[int, dict[str, Value]]]:
        flat = self.exported.flatten_batch(batch, kind)
        parts = torch.tensor_split(torch.arange(flat.rows), count)
        found: list[tuple[int, dict[str, Value]]] = []
        for part in parts:
            values = {
                name: value[part] if name in flat.batched and isinstance(value, torch.Tensor) else value
                for name, value in flat.values.items()
            }
            found.append((len(part), values))
        return found

    def _forward(
        self, batch: dict[str, Value], kind: graph_pb2.GraphKind, step: int, micro_batch: int, record: bool
    ) -> tuple[list[SegmentPass], dict[str, bool]]:
        sent: dict[str, Value] = dict(batch)
        made = []
        for segment in self.segments[kind]:
            values = {item.value: _received(sent[item.value]) for item in segment.incoming}
            keep = not (record and self._recompute)
            group = self._shard.group(f"{kind}/{step}/{micro_batch}/{segment.stage}")
            made.append(
                self.built(segment).forward(
                    values, step=step, micro_batch=micro_batch, record=record, keep=keep, group=group
                )
            )
            for item in segment.outgoing:
                if item.HasField("spread_dimension"):
                    self._shard.check_whole(group, f"{item.value}/sent", made[-1].outgoing[item.value])
            sent.update(made[-1].outgoing)
        return made, {name: isinstance(value, torch.Tensor) and value.requires_grad for name, value in sent.items()}

    def _backward(
        self,
        passes: list[SegmentPass],
        requires: dict[str, bool],
        loss_gradient: float,
        waiting: list[SegmentPass] | None,
        about: str,
    ) -> None:
        """Go back through the stages; where there is a list for it, leave out the weights, and append the passes."""
        gradients: dict[tuple[str, int, int], torch.Tensor | None] = {}  # (value, from stage, to stage)
        segments = self.segments[graph_pb2.GRAPH_KIND_TRAIN]
        for segment, made in reversed(list(zip(segments, passes, strict=True))):
            stage = segment.stage
            from_first = {
                item.value: _copied(gradients[item.value, item.consumer_stages[0], stage])
                for item in segment.outgoing
                if requires[item.value]
            }
            relayed = {
                item.value: _copied(gradients[item.value, item.gradient_from_stage, stage])
                for item in segment.incoming
                if item.HasField("gradient_from_stage") and requires[item.value]
            }
            group = self._shard.group(f"back/{about}/{stage}")
            if made.inputs is not None:
                made = self.built(segment).again(made.inputs, group)
            if waiting is None:
                back = made.backward(from_first, relayed, loss_gradient)
            else:
                back = made.backward_input(from_first, relayed, loss_gradient)
                waiting.append(made)
            for item in segment.incoming:
                if requires[item.value]:
                    gradient = gradients[item.value, stage, item.gradient_to_stage] = back[item.value]
                    if item.HasField("spread_dimension"):
                        self._shard.check_whole(group, f"{item.value}/returned", gradient)

    def _gradients(self, weight: float) -> dict[str, torch.Tensor]:
        totals: dict[str, torch.Tensor] = {}
        for store in self.stores:
            for name, tensor in store.items():
                if tensor.grad is not None:
                    totals[name] = totals[name] + tensor.grad if name in totals else tensor.grad.clone()
        return {name: total / weight for name, total in totals.items()}

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {
            name: tensor
            for store in self.stores
            for name, tensor in store.items()
            if not isinstance(tensor, nn.Parameter)
        }


def whole_segment(exported: ExportedModel) -> stage_pb2.Segment:
    """The whole train graph as one segment."""
    graph = exported.proto.train
    return stage_pb2.Segment(
        graph=graph.kind,
        nodes=graph.nodes,
        tensors=graph.tensors,
        incoming=[stage_pb2.IncomingValue(value=item.value, from_batch=True) for item in graph.inputs],
        buffer_updates=graph.buffer_updates,
        mutated_tensors=graph.mutated_tensors,
        mutated_inputs=graph.mutated_inputs,
        loss=graph.outputs[0].value,
    )


def eager(
    model: nn.Module,
    loss: Any,
    batch: Any,
    micro_batches: int = 1,
    weights: Sequence[float] | None = None,
    precision: torch.dtype | None = None,
) -> Outcome:
    """The reference: one process over the same micro-batches, weighted by rows or as given."""
    model = copy.deepcopy(model).train()
    leaves, structure = pytree.tree_flatten(batch)
    rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor))
    parts = torch.tensor_split(torch.arange(rows), micro_batches)
    used = [float(len(part)) for part in parts] if weights is None else list(weights)
    total = 0.0
    for part, weight in zip(parts, used, strict=True):
        picked = [leaf[part] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        picked = [leaf.tensor if isinstance(leaf, Unbatched) else leaf for leaf in picked]
        *inputs, target = pytree.tree_unflatten(picked, structure)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            value = loss(model(*inputs), target)
        value = value * weight
        value.backward()
        total += float(value.detach())
    scale = sum(used)
    gradients = {name: item.grad / scale for name, item in model.named_parameters() if item.grad is not None}
    return Outcome(total / scale, gradients, dict(model.named_buffers()))


def assert_equal(got: Outcome, expected: Outcome, tolerance: float = 1e-10) -> None:
    """Loss and gradients equal, relative to each tensor's largest; buffers, too, where both have them."""
    assert abs(got.loss - expected.loss) <= tolerance * max(1.0, abs(expected.loss))
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        difference = float((got.gradients[name] - gradient).abs().max())
        assert difference <= tolerance * scale, f"gradient of {name} is off by {difference} of {scale}"
    for name, buffer in expected.buffers.items():
        if name in got.buffers:
            torch.testing.assert_close(got.buffers[name], buffer, rtol=tolerance, atol=tolerance)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _received(value: Value) -> Value:
    """What arrives: the elements in their own dense strides, and whether a gradient is wanted."""
    if not isinstance(value, torch.Tensor):
        return value
    return dense(value.detach()).clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)


def _copied(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else dense(gradient).clone(memory_format=torch.preserve_format)
