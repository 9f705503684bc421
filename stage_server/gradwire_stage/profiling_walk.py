"""One walk through a graph that measures its groups, for micro-batches of so many rows.

A group gets the values that the groups before it gave. One that cannot be run, or does not fit into memory, has no
numbers, and made-up values stand in for its own. Groups that are alike are run once, and give the same values.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence

import torch

from gradwire_protocol.errors import GradwireError
from gradwire_protocol.optimizer_state import tensor_bytes
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.profiling_groups import Group, Grouping
from gradwire_stage.profiling_held import HeldBytes
from gradwire_stage.profiling_runs import GroupRunner, Measured
from gradwire_stage.profiling_values import Maker, index_bounds, size_bytes
from gradwire_stage.segment import Value

# Of the values that a group makes: their gradients, and what operators use inside.
_VALUES_FACTOR = 4
# A tensor of the model and its gradient.
_TENSORS_FACTOR = 2
_FAILURE_CHARACTERS = 300


class Walk:
    """Measures one group after the other, in the order of the graph."""

    def __init__(
        self,
        graph: graph_pb2.Graph,
        tensors: Mapping[str, graph_pb2.TensorSpec],
        grouping: Grouping,
        groups: Sequence[Group],
        runner: GroupRunner,
        maker: Maker,
        *,
        rows: int,
        memory_bytes: int,
        until: float,
    ) -> None:
        """until: the time (time.perf_counter) after which nothing more is begun."""
        self._inputs = {item.value: item.spec for item in graph.inputs}
        self._bounds = index_bounds(graph, tensors, rows)
        self._grouping = grouping
        self._runner = runner
        self._maker = maker
        self._rows = rows
        self._memory_bytes = memory_bytes
        self._until = until
        self._live: dict[str, Value] = {}
        self._held = HeldBytes()
        # By what groups have in common: what was measured, or why it was not.
        self._known: dict[Hashable, Measured | str] = {}
        self._left = len({group.key for group in groups})

    def measure(self, group: Group, end: int) -> stage_pb2.GroupCost:
        """Measure the next group, which ends at this position."""
        values = [self._value(name) for name in group.incoming]
        incoming = [value for value in values if value is not None]
        numbers = tuple(value for value in incoming if isinstance(value, int | float))
        key = (group.key, numbers)
        repeated = key in self._known
        if len(incoming) < len(values):
            found: Measured | str = "it reads what could not be made up"
        else:
            if not repeated:
                self._known[key] = self._run(group, incoming)
                self._left = max(1, self._left - 1)
            found = self._known[key]
        if isinstance(found, str):
            cost = stage_pb2.GroupCost(failure=found)
            given = self._made_up(group)
        else:
            cost = stage_pb2.GroupCost(
                forward_seconds=found.forward,
                input_gradient_seconds=found.input_gradient,
                weight_gradient_seconds=found.weight_gradient,
                held_bytes=self._held.add(group.incoming, group.outgoing, found.kept),
            )
            given = dict(zip(group.outgoing, found.outgoing, strict=True))
        dead = self._grouping.dead_after(end, self._live)
        for name in dead:
            del self._live[name]
        self._held.forget(dead)
        self._live.update(self._apart(given) if repeated else given)
        return cost

    def _run(self, group: Group, incoming: Sequence[Value]) -> Measured | str:
        now = time.perf_counter()
        if now >= self._until:
            return "the time for measuring was over"
        live = sum(value.nbytes for value in self._live.values() if not isinstance(value, int | float))
        needed = live + _TENSORS_FACTOR * sum(tensor_bytes(spec) for spec in group.tensors)
        needed += _VALUES_FACTOR * sum(size_bytes(spec, self._rows) for spec in group.specs)
        if needed > self._memory_bytes:
            return f"it takes about {needed} bytes to run, and may take {self._memory_bytes}"
        try:
            tensors = {spec.name: self._maker.tensor(spec) for spec in group.tensors}
            return self._runner.run(
                group.segment, tensors, incoming, until=now + (self._until - now) / max(1, self._left)
            )
        except (GradwireError, RuntimeError, MemoryError, ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"[:_FAILURE_CHARACTERS]

    def _value(self, name: str) -> Value | None:
        """Return a value that a group reads; None if there is none."""
        if name in self._inputs and name not in self._live:
            made = self._make(self._inputs[name], self._bounds.get(name))
            if made is not None:
                self._live[name] = made
        return self._live.get(name)

    def _apart(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return values that were given before, with memory of their own where others have it still."""
        taken = {value.untyped_storage().data_ptr() for value in self._live.values() if isinstance(value, torch.Tensor)}
        copies: dict[int, torch.UntypedStorage] = {}
        found: dict[str, Value] = {}
        for name, value in values.items():
            found[name] = value
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in taken:
                storage = value.untyped_storage()
                if storage.data_ptr() not in copies:
                    copies[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
                made = torch.empty(0, dtype=value.dtype, device=value.device)
                made.set_(copies[storage.data_ptr()], value.storage_offset(), value.size(), value.stride())
                found[name] = made.requires_grad_(value.requires_grad)
        return found

    def _made_up(self, group: Group) -> dict[str, Value]:
        """Return values in place of those that a group could not make; numbers cannot be made up."""
        found = {}
        for name, spec in zip(group.outgoing, group.specs, strict=False):
            made = self._make(spec, bound=1) if spec.kind == graph_pb2.VALUE_KIND_TENSOR else None
            if made is not None:
                found[name] = made
        return found

    def _make(self, spec: graph_pb2.ValueSpec, bound: int | None) -> Value | None:
        numbers: dict[int, Value] = {
            graph_pb2.VALUE_KIND_INTEGER: 1,
            graph_pb2.VALUE_KIND_REAL: 1.0,
            graph_pb2.VALUE_KIND_BOOLEAN: True,
        }
        if spec.kind != graph_pb2.VALUE_KIND_TENSOR:
            return numbers.get(spec.kind)
        if size_bytes(spec, self._rows) > self._memory_bytes // _VALUES_FACTOR:
            return None
        return self._maker.value(spec, self._rows, bound)
