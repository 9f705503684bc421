"""Buffers that a training step changes, such as the running statistics of BatchNorm, where replicas see other rows.

One process would change them micro-batch after micro-batch. Here each replica changes its own copy while it goes; what
a micro-batch has added is then exchanged, and every replica applies all of it from the step's beginning, in the order
of the whole step: the same bits everywhere. That needs changes of the form new = factor · old + something that does not
depend on old, as running averages and counters have; any other is refused when a run is prepared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch

from gradwire_protocol.errors import FrameError, ModelError
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_stage.exchange.collectives import Group, Steps, all_gather

# Positions of momentum, and of what says that statistics are of the batch.
_AVERAGES = {"aten.batch_norm.default": (6, 5), "aten.instance_norm.default": (6, 5)}
_COUNTER = "aten.add_.Tensor"


class ReplicaBuffers:
    """The changing buffers of a server. For the compute thread."""

    def __init__(self, segments: Iterable[stage_pb2.Segment], tensors: MutableMapping[str, torch.Tensor]) -> None:
        """tensors: the server's store, whose entries are replaced, never written to. ModelError."""
        self._tensors = tensors
        self._factors: dict[str, float] = {}
        for segment in segments:
            if segment.graph == graph_pb2.GRAPH_KIND_TRAIN:
                self._factors |= _factors(segment)
        kinds: dict[torch.dtype, list[str]] = defaultdict(list)
        for name, factor in self._factors.items():
            kinds[tensors[name].dtype].append(name)
            if factor != 1 and not tensors[name].is_floating_point():
                raise _refused(name, f"a change by the factor {factor} of whole numbers")
        self._kinds = dict(kinds)
        self._start: dict[str, torch.Tensor] = {}
        # By micro-batch and name.
        self._changes: dict[tuple[int, str], torch.Tensor] = {}

    def begin(self) -> None:
        """A training step begins."""
        self._start = self.versions()
        self._changes.clear()

    def versions(self) -> dict[str, torch.Tensor]:
        """Return the buffers as they are."""
        return {name: self._tensors[name] for name in self._factors}

    def changed(self, micro_batch: int, before: Mapping[str, torch.Tensor]) -> None:
        """Take note of what the forward of a micro-batch has changed."""
        for name, old in before.items():
            new = self._tensors[name]
            if new is not old:
                factor = self._factors[name]
                self._changes[micro_batch, name] = new - (old if factor == 1 else old * factor)

    def finish(self, group: Group, micro_batches: Sequence[run_pb2.MicroBatch]) -> Steps[None]:
        """Apply the changes of all replicas in the order of micro-batches. FrameError for what does not fit."""
        for number, (kind, names) in enumerate(self._kinds.items()):
            start = torch.cat([self._start[name].reshape(-1) for name in names])
            rows = [
                torch.cat([self._changes[part.index, name].reshape(-1) for name in names])
                for part in micro_batches
                if part.replica == group.own
            ]
            own = torch.stack(rows) if rows else start.new_empty((0, len(start)))
            found = yield from all_gather(group, own, f"{number}-")
            changes = dict(zip(group.members, found, strict=True))
            taken = dict.fromkeys(group.members, 0)
            factors = start.new_tensor([self._factors[name] for name in names]).repeat_interleave(
                torch.tensor([self._start[name].numel() for name in names], device=start.device)
            )
            value = start
            for part in micro_batches:
                row = taken[part.replica]
                taken[part.replica] += 1
                value = value * factors + _row(changes[part.replica], row, start, kind, part.replica)
            for member, count in taken.items():
                if len(changes[member]) != count:
                    raise _misfit(member, f"changes of {count} micro-batches", changes[member])
            sizes = [self._start[name].numel() for name in names]
            for name, flat in zip(names, torch.split(value, sizes), strict=True):
                self._tensors[name] = flat.view(self._start[name].shape).clone()
        self._changes.clear()


def _row(changes: torch.Tensor, row: int, like: torch.Tensor, kind: torch.dtype, member: int) -> torch.Tensor:
    if changes.dtype != kind or changes.dim() != 2 or changes.shape[1:] != like.shape or row >= len(changes):
        raise _misfit(member, f"{kind}, {row + 1} rows of {len(like)} at least", changes)
    return changes[row]


def _misfit(member: int, expected: str, got: torch.Tensor) -> FrameError:
    return FrameError(
        f"What replica {member} has changed of buffers does not fit",
        expected=expected,
        got=f"shape {list(got.shape)}, {got.dtype}",
    )


def _factors(segment: stage_pb2.Segment) -> dict[str, float]:
    """Return what the old value of each changing buffer is multiplied with; ModelError if that is not known."""
    tensor_of = {use.value: use.tensor for use in segment.tensors}
    factors: dict[str, float] = {}
    for update in segment.buffer_updates:
        raise _refused(update.tensor, "an assignment")
    for node in segment.nodes:
        arguments = list(node.arguments)
        named = [(item.value, item.name in node.mutated_keyword_arguments) for item in node.keyword_arguments]
        written = [(item, place in node.mutated_arguments) for place, item in enumerate(arguments)] + named
        for argument, is_written in written:
            tensor = tensor_of.get(argument.value) if argument.WhichOneof("kind") == "value" else None
            if not is_written or tensor is None:
                continue
            factors[tensor] = factors.get(tensor, 1.0) * _factor(node, tensor)
    # Written to by way of a view, say.
    for tensor in segment.mutated_tensors:
        if tensor in tensor_of.values() and tensor not in factors:
            raise _refused(tensor, "an operator that writes to a part of it")
    return factors


def _factor(node: graph_pb2.Node, tensor: str) -> float:
    arguments = node.arguments
    if node.target in _AVERAGES and not node.keyword_arguments:
        momentum, of_batch = (arguments[position] for position in _AVERAGES[node.target])
        if of_batch.boolean and momentum.WhichOneof("kind") in ("real", "integer"):
            return 1.0 - (momentum.real or momentum.integer)
    if node.target == _COUNTER and len(arguments) == 2 and arguments[1].WhichOneof("kind") in ("real", "integer"):
        return 1.0
    raise _refused(tensor, node.target)


def _refused(tensor: str, how: str) -> ModelError:
    return ModelError(
        f"Replicas cannot agree on the buffer {tensor!r}, which training changes",
        expected="running averages of batch_norm and instance_norm, and counters",
        got=how,
        remedy="use replicas=1, or stages instead of replicas",
    )
