"""Orders a flat list of operations and finds where it may be cut.

A cut must not separate an operator with several outputs from the getitem nodes that read them, nor fall between the
making of a value and an in-place change of it, nor part the readers of a buffer from its writer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gradwire.graph.operations import GETITEM, Operation


@dataclass(frozen=True)
class Normal:
    """An ordered list of operations, with its allowed cuts and what in-place operators write to."""

    operations: tuple[Operation, ...]
    allowed_cuts: tuple[int, ...]
    mutated_tensors: tuple[str, ...]  # values of tensor uses
    mutated_inputs: tuple[str, ...]


def normalise(
    operations: Sequence[Operation],
    outputs: Iterable[str],
    tensors: Mapping[str, str],
    inputs: Sequence[str],
    updates: Mapping[str, str],
) -> Normal:
    """Hoist getitem nodes, drop dead operations, find cuts.

    `tensors` maps the values of tensor uses to tensor names; `updates` maps a node's value to the tensor whose new
    value it is. Values of one tensor share its memory.
    """
    memory = AliasSets(operations, tensors)
    alive = _alive(_hoisted(operations), {*outputs, *updates}, set(tensors), memory)
    written = {memory.root(value) for operation in alive for value in operation.writes}
    return Normal(
        operations=tuple(alive),
        allowed_cuts=_allowed_cuts(alive, tensors, inputs, updates, memory),
        mutated_tensors=tuple(value for value in tensors if memory.root(value) in written),
        mutated_inputs=tuple(value for value in inputs if memory.root(value) in written),
    )


class AliasSets:
    """Union-find over the values of a graph: one set for all that may share memory."""

    def __init__(self, operations: Iterable[Operation], tensors: Mapping[str, str]) -> None:
        self._parents: dict[str, str] = {}
        first_use: dict[str, str] = {}
        for value, tensor in tensors.items():
            self._join(value, first_use.setdefault(tensor, value))
        for operation in operations:
            for value in operation.aliases:
                self._join(operation.name, value)

    def root(self, value: str) -> str:
        """The name that stands for all values that may share memory with `value`."""
        while value in self._parents:
            value = self._parents[value]
        return value

    def _join(self, value: str, other: str) -> None:
        first, second = self.root(value), self.root(other)
        if first != second:
            self._parents[first] = second


def _hoisted(operations: Sequence[Operation]) -> list[Operation]:
    """Move each getitem directly behind the operator whose output it reads."""
    readers: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        if operation.node.target == GETITEM:
            readers[operation.reads[0]].append(operation)
    ordered: list[Operation] = []

    def place(operation: Operation) -> None:
        ordered.append(operation)
        for reader in readers[operation.name]:
            place(reader)

    for operation in operations:
        if operation.node.target != GETITEM:
            place(operation)
    return ordered


def _alive(operations: Sequence[Operation], wanted: set[str], tensors: set[str], memory: AliasSets) -> list[Operation]:
    """Drop what no output depends on. A write is wanted if its memory is a tensor's, or read later."""
    wanted = set(wanted)
    roots = {memory.root(value) for value in wanted | tensors}
    kept: list[Operation] = []
    for operation in reversed(operations):
        if operation.name in wanted or any(memory.root(value) in roots for value in operation.writes):
            kept.append(operation)
            wanted.update(operation.reads)
            roots.update(memory.root(value) for value in operation.reads)
    return kept[::-1]


def _allowed_cuts(
    operations: Sequence[Operation],
    tensors: Mapping[str, str],
    inputs: Sequence[str],
    updates: Mapping[str, str],
    memory: AliasSets,
) -> tuple[int, ...]:
    """Return the positions c such that the list may be cut before operation c."""
    position = {operation.name: index for index, operation in enumerate(operations)}
    outside = {memory.root(value) for value in (*tensors, *inputs)}
    first: dict[str, int] = {}
    last_use: dict[str, int] = {}
    last_write: dict[str, int] = {}
    for index, operation in enumerate(operations):
        for value in (operation.name, *operation.reads):
            root = memory.root(value)
            first.setdefault(root, index)
            last_use[root] = index
        for value in operation.writes:
            last_write[memory.root(value)] = index
    forbidden = {index for index, operation in enumerate(operations) if operation.node.target == GETITEM}
    for root, index in last_write.items():
        forbidden.update(range(first[root] + 1, (last_use[root] if root in outside else index) + 1))
    for value, tensor in updates.items():
        together = [index for index, operation in enumerate(operations) if tensor in map(tensors.get, operation.reads)]
        together.append(position[value])
        forbidden.update(range(min(together) + 1, max(together) + 1))
    return tuple(cut for cut in range(1, len(operations)) if cut not in forbidden)
