"""What a graph costs: seconds of each node on each device, and bytes of each value that a cut could make travel.

The one place that decides between what was measured and what the shapes say. Leaves to others: having it measured
(`cost_book.py`), and choosing cuts (`partition.py`). Not counted: the optimizer's work, and the exchange of tied
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from gradwire_coordinator.graph_index import GraphIndex, can_need_gradient, read_values, value_bytes
from gradwire_coordinator.measured_costs import NOTHING_BESIDE, ActionSeconds, Cost, Floats, Integers, MeasuredGroups
from gradwire_protocol.operators import is_custom
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2

# The backward of most operators is two operators of the forward's size: one for the input, one for the weights.
BACKWARD_TO_FORWARD = 2.0
# I and W apart take so much longer than B: activations are read twice.
SPLIT_COST = 1.03
# Of links nothing is known yet: between loopback and 10 Gbit/s Ethernet.
LINK_BYTES_PER_SECOND = 1e9
# Calling an operator costs this, however small its tensors. Of operators that are not torch's nothing else is known.
_NODE_SECONDS, _CUSTOM_NODE_SECONDS = 10e-6, 100e-6
# An action beside its nodes, on a modest processor.
_ACTION = ActionSeconds(forward=1e-4, backward=1e-4, weight_gradient=2e-5, receive=1e-4, send=1e-4)
# Where a server measured nothing: (operations a second, bytes a second) of a modest device of its kind.
_DEFAULT_RATES = {"cpu": (2e10, 5e9), "cuda": (1e13, 5e11)}


ESTIMATED, MEASURED = "estimated", "measured"


class DeviceMake(NamedTuple):
    """Devices of the same make, with as many threads, are equally fast."""

    kind: str
    name: str
    threads: int

    @classmethod
    def of(cls, device: coordinator_pb2.DeviceInfo) -> DeviceMake:
        """The make of a device."""
        return cls(device.kind, device.name, device.threads)


@dataclass(frozen=True)
class NodeCosts:
    """What each node of the train graph costs on one make of device, for a micro-batch of `rows`. Arrays by node."""

    rows: int
    # Seconds: F, I and W. W is 0 where a node reads nothing that trains.
    forward: Floats
    input_gradient: Floats
    weight_gradient: Floats
    # Kept from forward to backward, without the model's tensors. What several nodes keep counts at the first of them.
    held_bytes: Integers
    # MEASURED, where some of it was, or ESTIMATED.
    source: str
    action: ActionSeconds = NOTHING_BESIDE

    @property
    def backward(self) -> Floats:
        """Seconds of B: of I and W in one."""
        whole: Floats = (self.input_gradient + self.weight_gradient) / SPLIT_COST
        return whole

    def seconds(self, *, recompute: bool = False) -> Floats:
        """Return forward plus backward, with a second forward if it is run again for the backward."""
        total: Floats = self.forward * (2.0 if recompute else 1.0) + self.backward
        return total


@dataclass(frozen=True)
class Rates:
    """How fast a device computes and moves its memory."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class TravellingValue:
    """A node's value that would cross a cut between the node that makes it and one that reads it."""

    made: int
    # Positions of the nodes that read it, ascending, at least one.
    read: tuple[int, ...]
    # For one micro-batch; the gradient has none where the type has no gradient.
    size_bytes: int
    gradient_bytes: int
    # All of it, where a server sends a part only, and those that read it bring the parts together; None: the same.
    whole_bytes: int | None = None

    @property
    def kept_bytes(self) -> int:
        """What a stage holds that reads it."""
        return self.size_bytes if self.whole_bytes is None else self.whole_bytes


def device_rates(devices: Sequence[coordinator_pb2.DeviceInfo]) -> list[Rates]:
    """Return how fast each device is: as measured, with sensible rates in place of what is missing or impossible.

    Devices of the same make are equally fast: the best that any of them measured counts, since whatever else a machine
    does while it measures can only make it look slower.
    """
    best: dict[DeviceMake, Rates] = {}
    for device in devices:
        make = DeviceMake.of(device)
        flops = device.flops_per_second if _is_rate(device.flops_per_second) else 0.0
        memory = device.bytes_per_second if _is_rate(device.bytes_per_second) else 0.0
        known = best.get(make, Rates(0.0, 0.0))
        best[make] = Rates(max(known.flops_per_second, flops), max(known.bytes_per_second, memory))
    return [_with_defaults(device.kind, best[DeviceMake.of(device)]) for device in devices]


def _with_defaults(kind: str, rates: Rates) -> Rates:
    flops, memory = _DEFAULT_RATES.get(kind, _DEFAULT_RATES["cpu"])
    return Rates(rates.flops_per_second or flops, rates.bytes_per_second or memory)


def rows_per_micro_batch(expected_rows: int, micro_batches: int) -> int:
    """Return the rows of the largest micro-batch of a batch."""
    return math.ceil(expected_rows / min(expected_rows, micro_batches))


def trained_tensors(tensors: Mapping[str, graph_pb2.TensorSpec]) -> frozenset[str]:
    """Return the names of the parameters that train."""
    return frozenset(
        name for name, spec in tensors.items() if spec.kind == graph_pb2.TENSOR_KIND_PARAMETER and spec.requires_grad
    )


def node_costs(
    index: GraphIndex,
    trained: Collection[str],
    rows: int,
    devices: Sequence[coordinator_pb2.DeviceInfo],
    measured: Mapping[DeviceMake, MeasuredGroups] = MappingProxyType({}),
) -> list[NodeCosts]:
    """Return the costs of the nodes on each device: as measured on its make where it was, else as estimated.

    trained: names of the parameters that train (`trained_tensors`).
    """
    of_make: dict[DeviceMake, NodeCosts] = {}
    for device, rates in zip(devices, device_rates(devices), strict=True):
        make = DeviceMake.of(device)
        if make not in of_make:
            found = _estimated(index, trained, rows, rates)
            if make in measured:
                found = _as_measured(found, measured[make])
            of_make[make] = found
    return [of_make[DeviceMake.of(device)] for device in devices]


def _estimated(index: GraphIndex, trained: Collection[str], rows: int, rates: Rates) -> NodeCosts:
    nodes = index.graph.nodes
    forward = node_seconds(nodes, rows, [rates], backward=False)[0]
    backward = (node_seconds(nodes, rows, [rates])[0] - forward) * SPLIT_COST
    weights = {value for value, tensor in index.tensors.items() if tensor in trained}
    shared = np.array([bool(weights.intersection(read_values(node))) for node in nodes])
    weight_gradient = np.where(shared, backward / BACKWARD_TO_FORWARD, 0.0)
    # Mostly a value is kept by the node that makes it, or by one that reads it; views have no memory of their own.
    held = [
        value_bytes(node.output, rows)
        if seconds > 0 and (node.bytes.fixed or node.bytes.per_row) and node.output.kind == graph_pb2.VALUE_KIND_TENSOR
        else 0
        for node, seconds in zip(nodes, backward, strict=True)
    ]
    return NodeCosts(
        rows, forward, backward - weight_gradient, weight_gradient, np.array(held, np.int64), ESTIMATED, _ACTION
    )


def _as_measured(estimated: NodeCosts, groups: MeasuredGroups) -> NodeCosts:
    """Share out what groups of nodes took, as the estimate says; scale the estimate where nothing was measured."""
    rows = estimated.rows
    held = groups.share_out(Cost.HELD_BYTES, rows, estimated.held_bytes.astype(np.float64), otherwise=estimated.forward)
    return NodeCosts(
        rows=rows,
        forward=groups.share_out(Cost.FORWARD, rows, estimated.forward),
        input_gradient=groups.share_out(Cost.INPUT_GRADIENT, rows, estimated.input_gradient),
        weight_gradient=groups.share_out(Cost.WEIGHT_GRADIENT, rows, estimated.weight_gradient),
        held_bytes=np.rint(held).astype(np.int64),
        source=MEASURED,
        action=groups.action,
    )


def node_seconds(
    nodes: Sequence[graph_pb2.Node],
    rows: int,
    devices: Sequence[Rates],
    recomputes: Sequence[bool] | None = None,
    *,
    backward: bool = True,
) -> Floats:  # (devices, nodes)
    """Return estimated forward plus backward seconds of each node on each device, for one micro-batch of `rows`.

    A node takes what its arithmetic or its memory traffic takes, whichever is longer (the roofline model: Williams et
    al., 2009). `recomputes`: which devices run every forward a second time, for its backward.
    """
    flops = np.array([max(0, node.flops.fixed + node.flops.per_row * rows) for node in nodes], dtype=np.float64)
    moved = np.array([max(0, node.bytes.fixed + node.bytes.per_row * rows) for node in nodes], dtype=np.float64)
    passes = np.array(
        [
            1.0 + BACKWARD_TO_FORWARD if backward and not node.no_grad and can_need_gradient(node.output) else 1.0
            for node in nodes
        ]
    )
    calls = np.array([_CUSTOM_NODE_SECONDS if is_custom(node.target) else _NODE_SECONDS for node in nodes])
    again = [float(item) for item in recomputes or [False] * len(devices)]
    return np.stack(
        [
            (passes + extra) * (np.maximum(flops / rates.flops_per_second, moved / rates.bytes_per_second) + calls)
            for rates, extra in zip(devices, again, strict=True)
        ]
    )


def travelling_values(
    index: GraphIndex, rows: int, spread: Collection[str] = (), shards: int = 1
) -> list[TravellingValue]:
    """Return the values that later nodes read. What the client sends (inputs) crosses no cut.

    spread: those of which each of so many shards sends a part.
    """
    last = len(index.graph.nodes) - 1
    found = []
    for node in index.graph.nodes:
        made = index.producers[node.name]
        # The loss is read at the end of the graph, which the last node's stage does.
        read = tuple(dict.fromkeys(min(position, last) for position in index.readers.get(node.name, ())))
        read = tuple(position for position in read if position > made)
        if read:
            whole = value_bytes(node.output, rows)
            size = -(-whole // shards) if node.name in spread else whole
            gradient = size if can_need_gradient(node.output) else 0
            found.append(TravellingValue(made, read, size, gradient, whole if node.name in spread else None))
    return found


def _is_rate(value: float) -> bool:
    return math.isfinite(value) and value > 0
