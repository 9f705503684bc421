"""The ring all-reduce of gradients that are encoded element by element, with error feedback.

Parts of the bucket go round as in `collectives.all_reduce`; what is added up of one so far is encoded before each hop.
The sum is encoded once, by the member where it comes together, and everybody decodes those very bytes: so all have the
same bits. Every member encodes each part once a step, hence one remainder the size of the bucket is all that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.gradient_codecs import GradientCodec, encoded_bytes
from gradwire_stage.exchange import collectives
from gradwire_stage.exchange.collectives import Group, Receive, Ring, Steps, all_gather
from gradwire_stage.exchange.feedback import Kept, keep_difference, work_type


@dataclass(frozen=True, slots=True)
class ElementCodec:
    """A codec of flat tensors of one element or more, on whatever device they are."""

    name: str
    # From elements (flat, float32 or float64) to bytes (flat, uint8).
    encode: Callable[[torch.Tensor], torch.Tensor]
    # From such bytes to elements of the type wanted, in memory of their own.
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    # Gradients of elements no larger than this gain nothing, and go round as they are.
    element_bytes: int


class EncodedRing:
    """The reducer of an element-wise codec (`reducers.Reducer`)."""

    def __init__(self, codec: ElementCodec) -> None:
        self._codec = codec
        self._settings = GradientCodec(codec.name)
        self._residual = Kept()

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        ring = Ring(group)
        if ring.size == 1 or gradient.element_size() <= self._codec.element_bytes:
            exact = yield from collectives.all_reduce(group, gradient)
            return exact
        own = gradient.tensor_split(ring.size)
        kept = self._residual.like(gradient).tensor_split(ring.size)
        place = ring.place
        payload, sent = self._encode(own[place] + kept[place], kept[place])
        for hop in range(ring.size - 1):
            group.send(ring.next, f"s{hop}", payload)
            place = ring.passing(hop + 1)
            received = yield Receive(ring.before, f"s{hop}")
            partial = self._decode(received, own[place].numel(), work_type(gradient.dtype), ring.before)
            payload, sent = self._encode(partial.add_(own[place]).add_(kept[place]), kept[place])
        payloads = yield from all_gather(group, payload)
        total = torch.empty_like(gradient)
        parts = total.tensor_split(ring.size)
        parts[place].copy_(sent)
        for sender, payload in enumerate(payloads):
            if sender != ring.place:
                part = parts[(sender + 1) % ring.size]
                part.copy_(self._decode(payload, part.numel(), part.dtype, group.members[sender]))
        return total

    def state(self) -> dict[str, torch.Tensor]:
        return self._residual.state("residual")

    def _encode(self, wanted: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bytes, and what others make of them; keep the rest."""
        if not wanted.numel():
            return wanted.new_empty(0, dtype=torch.uint8), wanted
        payload = self._codec.encode(wanted)
        sent = self._codec.decode(payload, wanted.dtype)
        keep_difference(wanted, sent, kept)
        return payload, sent

    def _decode(self, payload: torch.Tensor, elements: int, data_type: torch.dtype, member: int) -> torch.Tensor:
        expected = encoded_bytes(self._settings, (elements,), data_type.itemsize)
        if payload.dtype != torch.uint8 or payload.shape != (expected,):
            raise FrameError(
                f"A part of the gradients that member {member} sent does not fit",
                expected=f"{expected} bytes for {elements} elements",
                got=f"shape {list(payload.shape)}, {payload.dtype}",
            )
        if not elements:
            return payload.new_empty(0, dtype=data_type)
        return self._codec.decode(payload, data_type)
