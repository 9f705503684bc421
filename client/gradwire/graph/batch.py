"""The structure of the user's batch: its leaves, their names, what is split by rows, and checks of later batches.

Leaves to the exporter what the model makes of the leaves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gradwire.graph.dynamic import Dynamic, Measured, Size, check_dimension, check_sizes, read_dims
from gradwire_protocol.errors import BatchError, ModelError
from gradwire_protocol.v1 import graph_pb2 as pb

Batch = tuple[Any, ...] | list[Any] | Mapping[str, Any]

# Keys of a batch given as a dict that may hold the loss's target.
TARGET_KEYS = ("target", "targets", "labels", "label")
NO_TARGET = ()  # where a batch has no target: it has no leaves
_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Unbatched:
    """Marks a tensor of the batch whose dimension 0 is not the batch: every micro-batch gets it whole."""

    tensor: torch.Tensor


def unbatched(tensor: torch.Tensor) -> Unbatched:
    """Mark a tensor of an example as shared by all rows, such as a (time, time) mask."""
    return Unbatched(tensor)


@dataclass(frozen=True)
class FlatBatch:
    """A checked batch: graph values by name, and which of them are split along dimension 0."""

    rows: int
    values: dict[str, torch.Tensor | int | float | bool]
    batched: set[str]


@dataclass(frozen=True)
class Leaf:
    """One leaf of the example."""

    label: str  # how to name it to the user
    value: str  # its name in the graphs; empty for constants
    is_target: bool
    batched: bool
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()  # without the rows where batched
    constant: Any = None
    dims: tuple[tuple[int, str], ...] = ()  # dimensions that differ from batch to batch, and their names

    def measured(self, tensor: torch.Tensor) -> list[Measured]:
        """The sizes that a tensor has in the dynamic dimensions."""
        return [Measured(self.label, dimension, name, tensor.shape[dimension]) for dimension, name in self.dims]


@dataclass(frozen=True)
class BatchLayout:
    """The structure that every batch of a run has, taken from the example."""

    structure: pytree.TreeSpec = field(repr=False)
    input_structure: pytree.TreeSpec = field(repr=False)
    leaves: tuple[Leaf, ...]
    has_target: bool
    rows: int
    # The torch.export.Dim of each named dimension, and its size in the example.
    dims: Mapping[str, Any] = field(default_factory=dict)
    example_sizes: Mapping[str, int] = field(default_factory=dict)
    # What each exported program takes, by name of the dimension.
    sizes: tuple[Mapping[str, Size], ...] = ()
    # The rows of every micro-batch, where the graphs are made for these only.
    micro_batch_rows: int | None = None

    @property
    def tensors(self) -> tuple[Leaf, ...]:
        """The leaves that are tensors, in the order of the graphs' inputs."""
        return tuple(leaf for leaf in self.leaves if leaf.value)

    def rebuild(
        self, tensors: Sequence[torch.Tensor], *, with_target: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Put tensors and constants into the user's structure: positional and keyword inputs, and the target."""
        remaining = iter(tensors)
        wanted = (leaf for leaf in self.leaves if with_target or not leaf.is_target)
        leaves = [next(remaining) if leaf.value else leaf.constant for leaf in wanted]
        structure = self.structure if with_target else self.input_structure
        (arguments, keywords), target = pytree.tree_unflatten(leaves, structure)
        return arguments, keywords, target

    def flatten(self, batch: Any, kind: pb.GraphKind) -> FlatBatch:
        """Check a batch against the example. BatchError names the input that does not fit."""
        with_target = self.has_target and kind != pb.GRAPH_KIND_PREDICT
        structure = self.structure if with_target or not self.has_target else self.input_structure
        leaves = self.leaves if with_target else tuple(leaf for leaf in self.leaves if not leaf.is_target)
        try:
            tree = _divided(batch, self.has_target, with_target)
        except ModelError as error:
            raise BatchError(error.message, expected=error.expected, got=error.got, remedy=error.remedy) from None
        given, given_structure = pytree.tree_flatten(tree)
        if given_structure != structure:
            raise BatchError(
                "The batch is built differently from the example",
                expected=_described(leaves),
                got=_described_tree(tree),
                remedy="give every batch the structure of the example"
                + (" without its target" if self.has_target and not with_target else ""),
            )
        rows: dict[str, int] = {}
        values: dict[str, torch.Tensor | int | float | bool] = {}
        measured: list[Measured] = []
        for leaf, item in zip(leaves, given, strict=True):
            tensor = _checked(leaf, item.tensor if isinstance(item, Unbatched) else item)
            if tensor is not None:
                values[leaf.value] = tensor.detach()
                measured += leaf.measured(tensor)
                if leaf.batched:
                    rows[leaf.label] = tensor.shape[0]
        if len(set(rows.values())) > 1 or 0 in rows.values():
            raise BatchError(
                "The inputs of a batch have different or no rows",
                expected="the same number of rows in dimension 0 of each, at least 1",
                got=", ".join(f"{label}: {count}" for label, count in rows.items()),
            )
        for sizes in self.sizes:
            check_sizes(sizes, measured)
        batched = {leaf.value for leaf in leaves if leaf.batched}
        return FlatBatch(rows=next(iter(rows.values())), values=values, batched=batched)


def read_example(
    example: Any, has_loss: bool, dynamic: Dynamic | None = None
) -> tuple[BatchLayout, list[torch.Tensor]]:
    """Take the layout of all batches from an example, and the example's tensors. ModelError if it is unusable."""
    by_name = isinstance(example, Mapping)
    elements = list(example) if by_name else _elements(example, has_loss)
    named, dims = read_dims(dynamic, elements, by_name)
    target_key = next((key for key in TARGET_KEYS if by_name and has_loss and key in example), "target")
    tree = _divided(example, has_loss, has_loss)
    paths, structure = pytree.tree_flatten_with_path(tree)
    _, input_structure = pytree.tree_flatten((tree[0], NO_TARGET))
    leaves: list[Leaf] = []
    tensors: list[torch.Tensor] = []
    names: set[str] = set()
    for path, item in paths:
        label, is_target = _label(path, isinstance(example, Mapping))
        tensor = item.tensor if isinstance(item, Unbatched) else item
        if isinstance(tensor, torch.Tensor):
            batched = tensor.dim() > 0 and not isinstance(item, Unbatched)
            value = "batch." + re.sub(r"\W+", "_", label).strip("_")
            while value in names:
                value += "_"
            names.add(value)
            shape = tuple(tensor.shape[1:] if batched else tensor.shape)
            own = tuple(named.get(target_key if is_target and label == "target" else label, {}).items())
            for dimension, name in own:
                check_dimension(label, tensor, dimension, name, batched)
            leaves.append(Leaf(label, value, is_target, batched, dtype=tensor.dtype, shape=shape, dims=own))
            tensors.append(tensor.detach())
        elif isinstance(item, _CONSTANTS):
            leaves.append(Leaf(label, "", is_target, False, constant=item))
        else:
            raise ModelError(
                f"{label} of the example cannot be part of a batch",
                expected="tensors, numbers, strings or None, in tuples, lists and dicts",
                got=type(item).__name__,
                remedy="convert it to a tensor",
            )
    rows = {leaf.label: tensor.shape[0] for leaf, tensor in zip(_tensors(leaves), tensors, strict=True) if leaf.batched}
    if not rows or len(set(rows.values())) > 1 or 0 in rows.values():
        raise ModelError(
            "The inputs of the example do not share a batch dimension",
            expected="tensors with the same number of rows, at least 1, in dimension 0",
            got=", ".join(f"{label}: {count} rows" for label, count in rows.items()) or "no tensor with a dimension",
            remedy="wrap tensors whose dimension 0 is not the batch in gradwire.unbatched(...)",
        )
    measured = [item for leaf, tensor in zip(_tensors(leaves), tensors, strict=True) for item in leaf.measured(tensor)]
    sizes: dict[str, int] = {}
    for item in measured:
        if sizes.setdefault(item.name, item.size) != item.size:
            raise ModelError(
                f"In the example, dimensions named '{item.name}' have different sizes",
                expected="the same size in all",
                got=", ".join(str(other) for other in measured if other.name == item.name),
                remedy="give them different names",
            )
    layout = BatchLayout(structure, input_structure, tuple(leaves), has_loss, next(iter(rows.values())), dims, sizes)
    return layout, tensors


def with_rows(
    layout: BatchLayout, tensors: Sequence[torch.Tensor], rows: int
) -> tuple[BatchLayout, list[torch.Tensor]]:
    """The same for graphs that take micro-batches of so many rows only; the example is cut or repeated to these."""
    fitted = [
        take_rows(tensor, rows) if leaf.batched else tensor
        for leaf, tensor in zip(layout.tensors, tensors, strict=True)
    ]
    return replace(layout, rows=rows, micro_batch_rows=rows), fitted


def take_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The first rows, repeated where there are fewer."""
    return tensor[:rows] if tensor.shape[0] >= rows else torch.cat([tensor] * rows)[:rows]


def _elements(example: Any, has_loss: bool) -> list[str]:
    """The labels of the elements of an example in order."""
    count = len(example) if isinstance(example, tuple | list) else 1
    return [f"input {index}" for index in range(count - has_loss)] + ["target"] * has_loss


def _tensors(leaves: Sequence[Leaf]) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.value]


def _divided(batch: Any, has_loss: bool, with_target: bool) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """Divide a batch in ((positional inputs, keyword inputs), target)."""
    if isinstance(batch, Mapping):
        inputs, target = dict(batch), NO_TARGET
        if has_loss:
            found = [key for key in TARGET_KEYS if key in inputs]
            if with_target and not found:
                raise ModelError(
                    "A batch given as a dict has no target for the loss",
                    expected=f"one of the keys {', '.join(TARGET_KEYS)}",
                    got=", ".join(inputs),
                    remedy="add the target under one of these keys, or give a tuple (inputs…, target)",
                )
            if found:
                target = inputs.pop(found[0])
        return ((), inputs), target if with_target else NO_TARGET
    if not isinstance(batch, tuple | list):
        batch = (batch,)
    if not with_target:
        return (tuple(batch), {}), NO_TARGET
    if len(batch) < 2:
        raise ModelError(
            "A batch has no target for the loss",
            expected="a tuple (inputs…, target)",
            got=f"{len(batch)} element(s)",
            remedy="add the target, or use loss=None where the model's output is the loss",
        )
    return (tuple(batch[:-1]), {}), batch[-1]


def _label(path: pytree.KeyPath, keywords: bool) -> tuple[str, bool]:
    """Name a leaf by its path in ((positional, keywords), target)."""
    if path[0].idx == 1:  # type: ignore[attr-defined]
        return "target" + pytree.keystr(path[1:]), True
    first, rest = path[2], path[3:]
    name = str(first.key) if keywords else f"input {first.idx}"  # type: ignore[attr-defined]
    return name + pytree.keystr(rest), False


def _checked(leaf: Leaf, item: Any) -> torch.Tensor | None:
    if not leaf.value:
        if type(item) is not type(leaf.constant) or item != leaf.constant:
            raise BatchError(
                f"{leaf.label} differs from the example, where it was built into the graph",
                expected=repr(leaf.constant),
                got=repr(item),
                remedy="give it as a tensor if it changes from batch to batch",
            )
        return None
    if not isinstance(item, torch.Tensor):
        raise BatchError(
            f"{leaf.label} is not a tensor", expected="a tensor, as in the example", got=type(item).__name__
        )
    if item.dtype != leaf.dtype:
        raise BatchError(
            f"{leaf.label} has another dtype than the example",
            expected=str(leaf.dtype),
            got=str(item.dtype),
            remedy=f"convert it: tensor.to({leaf.dtype})",
        )
    shape = tuple(item.shape)
    expected = [-1] * leaf.batched + list(leaf.shape)
    if len(shape) != len(expected) or any(
        size != wanted
        for dimension, (size, wanted) in enumerate(zip(shape, expected, strict=True))
        if dimension not in dict(leaf.dims) and not (leaf.batched and dimension == 0)
    ):
        raise BatchError(
            f"{leaf.label} has another shape than the example",
            expected=_shape_text(leaf),
            got=str(shape),
            remedy="only the rows in dimension 0, and dimensions that `dynamic` names, may differ from batch to batch; "
            "pad, or name the dimension",
        )
    return item


def _shape_text(leaf: Leaf) -> str:
    sizes = ["rows"] * leaf.batched + [str(size) for size in leaf.shape]
    for dimension, name in leaf.dims:
        sizes[dimension] = name
    return f"({', '.join(sizes)})"


def _described(leaves: Sequence[Leaf]) -> str:
    return ", ".join(f"{leaf.label} {_shape_text(leaf) if leaf.value else repr(leaf.constant)}" for leaf in leaves)


def _described_tree(tree: Any) -> str:
    def short(item: Any) -> str:
        item = item.tensor if isinstance(item, Unbatched) else item
        return str(tuple(item.shape)) if isinstance(item, torch.Tensor) else repr(item)

    (arguments, keywords), target = pytree.tree_map(short, tree)
    parts = [*map(str, arguments), *(f"{key}={value}" for key, value in keywords.items())]
    return ", ".join(parts + ([f"target {target}"] if target != NO_TARGET else [])) or "nothing"
