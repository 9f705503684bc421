"""How single tensors travel between stages and parameter servers: as they are, or under an element-wise codec."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gradwire_protocol.errors import FrameError, PlanError
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_stage.exchange.element_codec import ElementCodec
from gradwire_stage.exchange.feedback import work_type
from gradwire_stage.exchange.half import BF16, FP16
from gradwire_stage.exchange.int8 import INT8

_CODECS: Mapping[str, ElementCodec | None] = {"none": None, "fp16": FP16, "bf16": BF16, "int8": INT8}


class TensorCodes:
    """Encodes and decodes flat tensors. PlanError for a codec that does not go by elements."""

    def __init__(self, codec: GradientCodec) -> None:
        if codec.name not in _CODECS:
            raise PlanError(
                "Parameter servers cannot work with this codec",
                expected=" or ".join(map(repr, _CODECS)),
                got=repr(str(codec)),
                remedy='use exchange="ring" for it',
            )
        self._codec = _CODECS[codec.name]

    def loses(self, data_type: torch.dtype) -> bool:
        """Whether tensors of a type are encoded."""
        return self._codec is not None and self._codec.shrinks(data_type)

    def encode(self, wanted: torch.Tensor, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what travels of a flat tensor, and what its receiver makes of it; `kept` gets what is lost."""
        if self._codec is None or not self.loses(wanted.dtype):
            return wanted, wanted
        return self._codec.send(wanted, kept)

    def decode(self, name: str, received: torch.Tensor, like: torch.Tensor, sender: str) -> torch.Tensor:
        """Return what was encoded, in the shape of a parameter; FrameError for what is not of its size."""
        if self._codec is not None and self.loses(like.dtype):
            made = self._codec.receive(received, like.numel(), work_type(like.dtype), sender)
            return made.view(like.shape)
        if received.dtype != like.dtype or received.shape != (like.numel(),):
            raise FrameError(
                f"What {sender} sent for the parameter {name!r} does not fit it",
                expected=f"{like.numel()} elements of {like.dtype}",
                got=f"shape {list(received.shape)}, {received.dtype}",
            )
        return received.view(like.shape)
