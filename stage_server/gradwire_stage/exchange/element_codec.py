"""A codec that goes element by element: what the ring and parameter servers do with one alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.gradient_codecs import GradientCodec, encoded_bytes
from gradwire_stage.exchange.feedback import keep_difference


@dataclass(frozen=True, slots=True)
class ElementCodec:
    """A codec of flat tensors of one element or more, on whatever device they are."""

    name: str
    # From elements (flat, float32 or float64) to bytes (flat, uint8).
    encode: Callable[[torch.Tensor], torch.Tensor]
    # From such bytes to elements of the type wanted, in memory of their own.
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    # Elements no larger than this gain nothing, and travel as they are.
    element_bytes: int

    def shrinks(self, data_type: torch.dtype) -> bool:
        """Whether tensors of a type are encoded at all."""
        return data_type.is_floating_point and data_type.itemsize > self.element_bytes

    def send(self, wanted: torch.Tensor, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bytes for a flat tensor, and what others make of them; `kept` gets what they miss."""
        if not wanted.numel():
            return wanted.new_empty(0, dtype=torch.uint8), wanted
        payload = self.encode(wanted)
        sent = self.decode(payload, wanted.dtype)
        if kept is not None:
            keep_difference(wanted, sent, kept)
        return payload, sent

    def receive(self, payload: torch.Tensor, elements: int, data_type: torch.dtype, sender: str) -> torch.Tensor:
        """Return so many elements, flat; FrameError, which names the sender, unless the bytes are theirs."""
        expected = encoded_bytes(GradientCodec(self.name), (elements,), data_type.itemsize)
        if payload.dtype != torch.uint8 or payload.shape != (expected,):
            raise FrameError(
                f"A part of the gradients that {sender} sent does not fit",
                expected=f"{expected} bytes for {elements} elements",
                got=f"shape {list(payload.shape)}, {payload.dtype}",
            )
        return self.decode(payload, data_type) if elements else payload.new_empty(0, dtype=data_type)
