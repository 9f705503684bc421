"""What there is to partition, and what comes out: the costs of nodes on devices, and cuts with a device for each part.

Data only. Leaves to others: where the numbers come from (`partition_inputs.py`), and solving (`partition.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gradwire_coordinator.costs import LINK_BYTES_PER_SECOND, TravellingValue
from gradwire_coordinator.placement import Placement, hosted
from gradwire_protocol.errors import PlanError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldTensor:
    """A parameter or buffer, and what a server that reads it holds for it: once, however many of its nodes do."""

    # Positions of the nodes that read it, ascending, at least one.
    read: tuple[int, ...]
    weight_bytes: int
    gradient_bytes: int = 0
    optimizer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Weights, gradient and optimizer state together."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class PartitionProblem:
    """A graph to be cut for devices; all costs are of one micro-batch.

    There may be more devices than `placement` has servers: the best are taken.
    """

    seconds: Floats  # (devices, nodes): forward and backward
    # Ascending positions at which the graph may be cut.
    cuts: Sequence[int]
    # The server of each stage. Server numbers are places in the pipeline: which device takes which is to be found.
    placement: Placement
    # Made and read by nodes.
    values: Sequence[TravellingValue] = ()
    # Inputs of the batch and their readers; `made` is without meaning. They cross no cut, but stages keep them, as what
    # comes from other stages.
    inputs: Sequence[TravellingValue] = ()
    tensors: Sequence[HeldTensor] = ()
    # What a node keeps from its forward to its backward, and what it needs besides while it runs.
    held_bytes: Integers | None = None  # (nodes,)
    transient_bytes: Integers | None = None  # (nodes,)
    # How many micro-batches a stage holds at most at once, by stage; empty: one each.
    live: Sequence[int] = ()
    # Which stages run the forward again before the backward, and keep only what came in until then; empty: none.
    recomputes: Sequence[bool] = ()
    # What the forward alone takes; needed where stages recompute.
    forward_seconds: Floats | None = None  # (devices, nodes)
    # By device; 0: not known, so without a limit. Empty: all.
    memory_bytes: Sequence[int] = ()
    # A number for all links, or (devices, devices), from a row's device to a column's.
    link_bytes_per_second: float | Floats = LINK_BYTES_PER_SECOND
    link_delay_seconds: float | Floats = 0.0
    # Whether devices stay as given: device k is server k.
    order_is_fixed: bool = False

    def __post_init__(self) -> None:
        devices, nodes = self.seconds.shape
        problems = [
            (self.servers <= devices, f"{self.servers} devices at least", f"{devices}"),
            (len(self.live) in (0, self.stages), f"live micro-batches of {self.stages} stages", f"{len(self.live)}"),
            (len(self.recomputes) in (0, self.stages), f"recomputes of {self.stages} stages", str(self.recomputes)),
            (len(self.memory_bytes) in (0, devices), f"memory of {devices} devices", f"{len(self.memory_bytes)}"),
            (not any(self.recomputes) or self.forward_seconds is not None, "forward_seconds", "recomputes without"),
            (all(0 < cut < nodes for cut in self.cuts), f"cuts between 0 and {nodes}", str(list(self.cuts)[:20])),
            (all(a < b for a, b in itertools.pairwise(self.cuts)), "ascending cuts", str(list(self.cuts)[:20])),
            (bool(np.isfinite(self.seconds).all() and (self.seconds >= 0).all()), "seconds of 0 or more", "others"),
            (bool((np.asarray(self.link_bytes_per_second) > 0).all()), "links faster than 0", "slower"),
        ]
        for right, expected, got in problems:
            if not right:
                raise PlanError("Costs that do not fit the plan", expected=expected, got=got)

    @property
    def stages(self) -> int:
        """All virtual stages."""
        return len(self.placement)

    @cached_property
    def hosted(self) -> list[list[int]]:
        """The stages of each server."""
        return hosted(self.placement)

    @property
    def servers(self) -> int:
        """How many devices are to be used."""
        return len(self.hosted)

    @property
    def one_stage_each(self) -> bool:
        """Whether stage k is on server k, for all."""
        return list(self.placement) == list(range(self.servers))

    @cached_property
    def links_are_alike(self) -> bool:
        """Whether it does not matter to a transfer between which devices it is."""
        apart = ~np.eye(len(self.seconds), dtype=bool)
        for of in self._links:
            different = of[apart]
            if different.size and (different != different[0]).any():
                return False
        return True

    def link(self, sender: int, receiver: int) -> tuple[float, float]:
        """Return (bytes a second, seconds of delay) from a device to another."""
        rates, delays = self._links
        return float(rates[sender, receiver]), float(delays[sender, receiver])

    @cached_property
    def _links(self) -> tuple[Floats, Floats]:
        shape = (len(self.seconds),) * 2
        return np.broadcast_to(self.link_bytes_per_second, shape), np.broadcast_to(self.link_delay_seconds, shape)

    def limit(self, device: int) -> float:
        """Return the bytes that a device has; infinite where that is not known."""
        return float(self.memory_bytes[device]) if self.memory_bytes and self.memory_bytes[device] else float("inf")

    @cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """Devices of equal speed and memory, ascending, by kind; kinds in the order of their first device."""
        found: dict[tuple[bytes, bytes, float], list[int]] = {}
        for device, row in enumerate(self.seconds):
            forward = b"" if self.forward_seconds is None else self.forward_seconds[device].tobytes()
            found.setdefault((row.tobytes(), forward, self.limit(device)), []).append(device)
        return tuple(map(tuple, found.values()))


@dataclass(frozen=True)
class ServerMemory:
    """What a server holds at its peak, in bytes. limit: what its device has, 0 if that is not known."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    limit: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def missing(self) -> int:
        """By how many bytes it does not fit."""
        return max(0, self.total - self.limit) if self.limit else 0


@dataclass(frozen=True)
class Partition:
    """Where the graph is cut, and which device takes which part."""

    # One fewer than stages.
    cuts: tuple[int, ...]
    # By server: the index of its device.
    devices: tuple[int, ...]
    # Of one micro-batch, transfers included: by stage.
    seconds: tuple[float, ...]
    # By server.
    server_seconds: tuple[float, ...]
    # No partition is faster than this; equal to `slowest` if exact.
    lower_bound: float
    # Whether it is proven that no other is faster.
    exact: bool
    # By server.
    memory: tuple[ServerMemory, ...] = ()
    # What crosses cuts forward in a micro-batch.
    sent_bytes: int = 0

    @property
    def slowest(self) -> float:
        """Seconds of the busiest server, for one micro-batch."""
        return max(self.server_seconds)

    @property
    def gap(self) -> float:
        """By which share of the lower bound a better partition could be faster at the most; 0 if exact."""
        if self.exact:
            return 0.0
        return self.slowest / self.lower_bound - 1 if self.lower_bound > 0 else float("inf")
