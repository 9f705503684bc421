"""How the members of a group come to agree on the gradients of a bucket: one reducer for every codec.

A reducer holds what its codec keeps of one bucket from step to step. The codecs have a file each; what none of them
changes goes round as it is (`collectives.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from gradwire_protocol.gradient_codecs import GRADIENT_CODEC_NAMES, GradientCodec
from gradwire_stage.exchange import collectives
from gradwire_stage.exchange.collectives import Group, Steps
from gradwire_stage.exchange.encoded_ring import EncodedRing
from gradwire_stage.exchange.half import BF16, FP16
from gradwire_stage.exchange.int8 import INT8
from gradwire_stage.exchange.powersgd import PowerSgd
from gradwire_stage.exchange.topk import TopK


class Reducer(Protocol):
    """Sums one bucket over the members of a group, in every step. All members make the same calls."""

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        """Return the sum as far as the codec keeps it, a tensor of the same bits everywhere; alone, the gradient.

        gradient: flat, not written to. step: its number in training, from 0.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """Return what is kept for later steps, over its own memory."""


class Exact:
    """The sum itself, but for rounding. Keeps nothing."""

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        total = yield from collectives.all_reduce(group, gradient)
        return total

    def state(self) -> dict[str, torch.Tensor]:
        return {}


_REDUCERS: dict[str, Callable[[GradientCodec, Sequence[torch.Size]], Reducer]] = {
    "none": lambda codec, shapes: Exact(),
    "fp16": lambda codec, shapes: EncodedRing(FP16),
    "bf16": lambda codec, shapes: EncodedRing(BF16),
    "int8": lambda codec, shapes: EncodedRing(INT8),
    "topk": lambda codec, shapes: TopK(codec),
    "powersgd": PowerSgd,
}

if set(_REDUCERS) != set(GRADIENT_CODEC_NAMES):
    raise RuntimeError("every codec of gradwire_protocol.gradient_codecs needs a reducer in gradwire_stage.exchange")


def make_reducer(codec: GradientCodec, shapes: Sequence[torch.Size]) -> Reducer:
    """Return the reducer of a bucket of parameters of these shapes, of one floating type. "none" takes any type."""
    return _REDUCERS[codec.name](codec, shapes)
