"""What a graph costs: seconds of each node on each device, and bytes of each value that a cut could make travel.

Leaves to others: choosing cuts (`partition.py`). Not counted: the optimizer's work, and the exchange of tied gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradwire_coordinator.graph_index import GraphIndex, can_need_gradient, value_bytes
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2

# The backward of most operators is two operators of the forward's size: one for the input, one for the weights.
BACKWARD_TO_FORWARD = 2.0
# Of links nothing is known yet: between loopback and 10 Gbit/s Ethernet.
LINK_BYTES_PER_SECOND = 1e9
# Calling an operator costs this, however small its tensors.
_NODE_SECONDS = 10e-6
# Where a server measured nothing: (operations a second, bytes a second) of a modest device of its kind.
_DEFAULT_RATES = {"cpu": (2e10, 5e9), "cuda": (1e13, 5e11)}


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


def device_rates(devices: Sequence[coordinator_pb2.DeviceInfo]) -> list[Rates]:
    """Return how fast each device is: as measured, with sensible rates in place of what is missing or impossible.

    Devices of the same make, with as many threads, are equally fast: the best that any of them measured counts, since
    whatever else a machine does while it measures can only make it look slower.
    """
    best: dict[tuple[str, str, int], Rates] = {}
    for device in devices:
        make = (device.kind, device.name, device.threads)
        flops = device.flops_per_second if _is_rate(device.flops_per_second) else 0.0
        memory = device.bytes_per_second if _is_rate(device.bytes_per_second) else 0.0
        known = best.get(make, Rates(0.0, 0.0))
        best[make] = Rates(max(known.flops_per_second, flops), max(known.bytes_per_second, memory))
    return [_with_defaults(device.kind, best[device.kind, device.name, device.threads]) for device in devices]


def _with_defaults(kind: str, rates: Rates) -> Rates:
    flops, memory = _DEFAULT_RATES.get(kind, _DEFAULT_RATES["cpu"])
    return Rates(rates.flops_per_second or flops, rates.bytes_per_second or memory)


def rows_per_micro_batch(expected_rows: int, micro_batches: int) -> int:
    """Return the rows of the largest micro-batch of a batch."""
    return math.ceil(expected_rows / min(expected_rows, micro_batches))


def node_seconds(
    nodes: Sequence[graph_pb2.Node], rows: int, devices: Sequence[Rates], recomputes: Sequence[bool] | None = None
) -> npt.NDArray[np.float64]:  # (devices, nodes)
    """Return forward plus backward seconds of each node on each device, for one micro-batch of `rows`.

    A node takes what its arithmetic or its memory traffic takes, whichever is longer (the roofline model: Williams et
    al., 2009). `recomputes`: which devices run every forward a second time, for its backward.
    """
    flops = np.array([max(0, node.flops.fixed + node.flops.per_row * rows) for node in nodes], dtype=np.float64)
    moved = np.array([max(0, node.bytes.fixed + node.bytes.per_row * rows) for node in nodes], dtype=np.float64)
    passes = np.array(
        [1.0 if node.no_grad or not can_need_gradient(node.output) else 1.0 + BACKWARD_TO_FORWARD for node in nodes]
    )
    again = [float(item) for item in recomputes or [False] * len(devices)]
    return np.stack(
        [
            (passes + extra)
            * (np.maximum(flops / rates.flops_per_second, moved / rates.bytes_per_second) + _NODE_SECONDS)
            for rates, extra in zip(devices, again, strict=True)
        ]
    )


def travelling_values(index: GraphIndex, rows: int) -> list[TravellingValue]:
    """Return the values that later nodes read. What the client sends (inputs) crosses no cut."""
    last = len(index.graph.nodes) - 1
    found = []
    for node in index.graph.nodes:
        made = index.producers[node.name]
        # The loss is read at the end of the graph, which the last node's stage does.
        read = tuple(dict.fromkeys(min(position, last) for position in index.readers.get(node.name, ())))
        read = tuple(position for position in read if position > made)
        if read:
            size = value_bytes(node.output, rows)
            found.append(TravellingValue(made, read, size, size if can_need_gradient(node.output) else 0))
    return found


def _is_rate(value: float) -> bool:
    return math.isfinite(value) and value > 0
