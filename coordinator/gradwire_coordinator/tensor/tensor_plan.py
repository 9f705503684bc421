"""Which parameters are split, and how: from a plan's rules and from how the training graph uses the parameters.

Leaves to others: looking for what to split where the rules leave it open (`auto_plan.py`), and rewriting graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from gradwire_coordinator.graph_index import GraphIndex
from gradwire_coordinator.tensor.parts import Part
from gradwire_coordinator.tensor.uses import Use, output_sections, uses_of
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import graph_pb2, run_pb2

COLUMN, ROW, VOCAB, WHOLE, AUTO = "column", "row", "vocab", "whole", "auto"
SPLITS = (COLUMN, ROW, VOCAB, WHOLE, AUTO)
_SHOWN_NAMES = 8


class TensorPlan:
    """The splits of a model's parameters for so many servers. Sections of rows are found when they are read first."""

    def __init__(self, index: GraphIndex, tensors: Mapping[str, graph_pb2.TensorSpec], shards: int) -> None:
        """index: of the training graph."""
        self.shards = shards
        self._index = index
        self._tensors = tensors
        self.uses: dict[str, list[Use]] = {}
        for use in uses_of(index):
            self.uses.setdefault(use.tensor, []).append(use)
        # Tensor -> its split by name, and, once it is settled, its part. Biases are here, too.
        self.splits: dict[str, str] = {}
        self._parts: dict[str, Part] = {}
        self._open_rows: set[str] = set()

    def part_of(self, tensor: str) -> Part | None:
        """Return the part that each server has; None: the whole."""
        self._open_rows.discard(tensor)
        return self._parts.get(tensor)

    def suggest(self, tensor: str, part: Part) -> None:
        """Take over how the inputs of a row's product are split, if it is not settled yet."""
        if tensor in self._open_rows and part.dim == self._parts[tensor].dim and part.size == self._parts[tensor].size:
            self._parts[tensor] = part

    @property
    def parts(self) -> Mapping[str, Part]:
        """The parts of all tensors that are split."""
        return self._parts

    def add(self, tensor: str, split: str) -> None:
        """Split a weight, and with a column's weight its bias; PlanError if that cannot be."""
        spec = self._tensors[tensor]
        use = self._use(tensor, split)
        inputs = 1 - use.outputs
        if split == ROW:
            self._check_divides(tensor, spec.shape[inputs], "inputs")
            self._parts[tensor] = Part(inputs, (spec.shape[inputs],))
            self._open_rows.add(tensor)
        elif split == VOCAB:
            rows = 1 - use.outputs if use.is_embedding else use.outputs
            self._check_divides(tensor, spec.shape[rows], "rows")
            self._parts[tensor] = Part(rows, (spec.shape[rows],))
        else:
            self._check_divides(tensor, spec.shape[use.outputs], "outputs")
            sections = (
                (spec.shape[use.outputs],) if use.is_embedding else output_sections(self._index, use, self.shards)
            )
            self._parts[tensor] = Part(use.outputs, sections)
        self.splits[tensor] = split
        if use.bias and split in (COLUMN, VOCAB) and self._is_only_bias(use):
            self.splits[use.bias] = split
            self._parts[use.bias] = self._parts[tensor].at(0)

    def remove(self, tensor: str) -> None:
        """Leave a weight whole after all, and its bias."""
        biases = [use.bias for use in self.uses.get(tensor, []) if use.bias]
        for name in (tensor, *biases):
            self.splits.pop(name, None)
            self._parts.pop(name, None)
            self._open_rows.discard(name)

    def _use(self, tensor: str, split: str) -> Use:
        uses = self.uses.get(tensor, [])
        wanted = [use for use in uses if split != ROW or not use.is_embedding]
        if split == VOCAB:
            wanted = sorted(uses, key=lambda use: not use.is_embedding)
        if not wanted:
            raise PlanError(
                f"{tensor} cannot be split between tensor-parallel servers",
                expected="the weight of a product with inputs (linear, addmm, matmul), or the table of an embedding",
                got=f"a tensor of shape {list(self._tensors[tensor].shape)} that is used otherwise",
                remedy=f'leave it out of tensor_plan, or give it "{WHOLE}"',
            )
        return wanted[0]

    def _is_only_bias(self, use: Use) -> bool:
        """Whether a bias belongs to this weight alone, and is as long as it has outputs."""
        positions = self._index.tensor_positions().get(use.bias, [])
        own = {self._index.producers[each.node.name] for each in self.uses[use.tensor] if each.bias == use.bias}
        spec = self._tensors[use.bias]
        return set(positions) == own and list(spec.shape) == [self._tensors[use.tensor].shape[use.outputs]]

    def _check_divides(self, tensor: str, size: int, what: str) -> None:
        if size % self.shards:
            raise PlanError(
                f"The {size} {what} of {tensor} cannot be shared equally by {self.shards} servers",
                expected=f"a multiple of {self.shards}",
                got=str(size),
                remedy=f'use a tensor that divides {size}, or give the parameter "{WHOLE}" in tensor_plan',
            )


def matched(
    rules: Sequence[run_pb2.TensorRule], tensors: Mapping[str, graph_pb2.TensorSpec]
) -> tuple[dict[str, str], bool]:
    """Return what rules say of parameters, and whether the rest is to be looked at, as without rules.

    PlanError for a rule that no parameter matches.
    """
    found: dict[str, str] = {}
    looks = not rules
    parameters = [spec for spec in tensors.values() if spec.kind == graph_pb2.TENSOR_KIND_PARAMETER]
    for rule in rules:
        named = [spec for spec in parameters if _matches(rule.pattern, spec)]
        if not named and rule.split != AUTO:
            raise PlanError(
                f"The pattern {rule.pattern!r} of tensor_plan matches no parameter",
                expected=f"a pattern for names such as {', '.join(_shown(parameters))}",
                got=repr(rule.pattern),
                remedy="name parameters as in model.named_parameters(), with * for what differs",
            )
        looks = looks or rule.split == AUTO
        for spec in named:
            found.setdefault(spec.name, rule.split)
    return {name: split for name, split in found.items() if split != AUTO}, looks


def _matches(pattern: str, spec: graph_pb2.TensorSpec) -> bool:
    return any(fnmatchcase(name, pattern) for name in {spec.name, *spec.names})


def _shown(parameters: Iterable[graph_pb2.TensorSpec]) -> list[str]:
    return [spec.name for spec in parameters if len(spec.shape) == 2][:_SHOWN_NAMES]
