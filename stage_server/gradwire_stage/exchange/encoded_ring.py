"""The ring all-reduce of gradients that are encoded element by element, with error feedback.

Parts of the bucket go round as in `collectives.all_reduce`; what is added up of one so far is encoded before each hop.
The sum is encoded once, by the member where it comes together, and everybody decodes those very bytes: so all have the
same bits. Every member encodes each part once a step, hence one remainder the size of the bucket is all that it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gradwire_stage.exchange import collectives
from gradwire_stage.exchange.collectives import Group, Receive, Ring, Steps, all_gather
from gradwire_stage.exchange.element_codec import ElementCodec
from gradwire_stage.exchange.feedback import Kept, work_type


class EncodedRing:
    """The reducer of an element-wise codec (`reducers.Reducer`)."""

    def __init__(self, codec: ElementCodec) -> None:
        self._codec = codec
        self._residual = Kept()

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        ring = Ring(group)
        if ring.size == 1 or not self._codec.shrinks(gradient.dtype):
            exact = yield from collectives.all_reduce(group, gradient)
            return exact
        own = gradient.tensor_split(ring.size)
        kept = self._residual.like(gradient).tensor_split(ring.size)
        place = ring.place
        payload, sent = self._codec.send(own[place] + kept[place], kept[place])
        for hop in range(ring.size - 1):
            group.send(ring.next, f"s{hop}", payload)
            place = ring.passing(hop + 1)
            received = yield Receive(ring.before, f"s{hop}")
            partial = self._codec.receive(
                received, own[place].numel(), work_type(gradient.dtype), f"member {ring.before}"
            )
            payload, sent = self._codec.send(partial.add_(own[place]).add_(kept[place]), kept[place])
        payloads = yield from all_gather(group, payload)
        total = torch.empty_like(gradient)
        parts = total.tensor_split(ring.size)
        parts[place].copy_(sent)
        for sender, payload in enumerate(payloads):
            if sender != ring.place:
                part = parts[(sender + 1) % ring.size]
                part.copy_(self._codec.receive(payload, part.numel(), part.dtype, f"member {group.members[sender]}"))
        return total

    def state(self) -> dict[str, torch.Tensor]:
        return self._residual.state("residual")

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        if "residual" in state:
            self._residual.put(state["residual"])
