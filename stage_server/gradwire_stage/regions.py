"""Runs parts of a segment without gradient recording, or under autocast, and seeds its random operators.

The generated code of a segment calls `enter`, `leave` and `seed` with the scope of the pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from gradwire_protocol.errors import InternalError
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import graph_pb2 as pb
from gradwire_stage.randomness import Randomness

if TYPE_CHECKING:
    from gradwire_stage.group.tensor_group import Shards


@dataclass(frozen=True)
class Region:
    """The contexts around consecutive nodes; `autocast` holds (dtype or None, enabled), outermost first."""

    no_grad: bool = False
    autocast: tuple[tuple[torch.dtype | None, bool], ...] = ()

    @classmethod
    def of(cls, node: pb.Node) -> Region:
        """The region that a node stands in."""
        autocast = tuple((TORCH_TYPES.get(item.data_type), item.enabled) for item in node.autocast)
        return cls(node.no_grad, autocast)


class Scope:
    """What the generated code of one pass needs beside tensors. A context manager: leaves its region on errors.

    With `precision` the whole pass runs under one autocast context. Its cache keeps the cast of a parameter from one
    use to the next, so that the gradients of all uses add up in that type, as they do in one process; the cache ends
    with the pass, before the optimizer changes the parameter. Regions of the model itself nest in it.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        device: torch.device,
        randomness: Randomness,
        step: int,
        micro_batch: int,
        precision: torch.dtype | None,
        group: Shards | None = None,
        *,
        writes: bool = False,
    ) -> None:
        """group: of the pass, where there are several shards. writes: whether a node writes to the value of another."""
        self.writes = writes
        self._group = group
        self._regions = regions
        self._device = device
        self._randomness = randomness
        self._step = step
        self._micro_batch = micro_batch
        self._precision = precision
        # Made only where there is something to enter: most passes have no region at all.
        self._around: contextlib.ExitStack | None = None
        self._entered: contextlib.ExitStack | None = None

    def __enter__(self) -> Scope:
        if self._precision is not None:
            self._around = contextlib.ExitStack()
            self._around.enter_context(torch.autocast(self._device.type, dtype=self._precision))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
        if self._around is not None:
            self._around.close()

    @property
    def group(self) -> Shards:
        """The servers that run group operators together."""
        if self._group is None:
            raise InternalError("A segment for tensor-parallel servers was run without the others")
        return self._group

    def enter(self, number: int) -> None:
        """Enter region `number`, after leaving the one before."""
        self._leave()
        region = self._regions[number]
        self._entered = contextlib.ExitStack()
        if region.no_grad:
            self._entered.enter_context(torch.no_grad())
        for dtype, enabled in region.autocast:
            self._entered.enter_context(torch.autocast(self._device.type, dtype=dtype, enabled=enabled))

    def seed(self, node: int) -> None:
        """Seed the generator for a node."""
        self._randomness.seed(self._step, self._micro_batch, node)

    def _leave(self) -> None:
        if self._entered is not None:
            self._entered.close()
            self._entered = None


def enter(scope: Scope, number: int) -> None:
    """Enter a region; called from generated code."""
    scope.enter(number)


def seed(scope: Scope, node: int) -> None:
    """Seed for a random operator; called from generated code."""
    scope.seed(node)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type of the autocast region that is entered; None if there is none."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
