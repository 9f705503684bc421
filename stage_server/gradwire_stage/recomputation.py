"""Forward passes whose intermediate values are not kept: they are run again, from the same inputs, before the backward.

A pass that will be run again is recorded all the same: whether an output needs a gradient, and which kernels operators
choose, depend on recording. What autograd would keep for the backward is dropped at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gradwire_protocol.errors import InternalError


@dataclass(frozen=True)
class Inputs:
    """All that a pass depends on, beside the segment itself: what it takes to run the pass again."""

    values: Mapping[str, Any]  # incoming
    # Parameters, and the versions of the buffers that the pass started from.
    tensors: tuple[torch.Tensor, ...]
    step: int
    micro_batch: int


def drop_saved_tensors() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which operators record, but keep nothing that a backward could use."""
    return torch.autograd.graph.saved_tensors_hooks(_drop, _refuse)


def _drop(tensor: torch.Tensor) -> None:
    return None


def _refuse(nothing: None) -> torch.Tensor:
    raise InternalError("A backward pass needs values that its forward pass did not keep")
