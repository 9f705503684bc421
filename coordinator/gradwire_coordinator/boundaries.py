"""What crosses each boundary of a cut model on its servers, and under which codec.

Pure. Leaves to others: cutting (`segments.py`), and choosing what the plan leaves open (`codec_choice.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradwire_coordinator.codec_choice import (
    Boundary,
    Choice,
    Travelling,
    choose_codecs,
    travelling_bytes,
    with_transfers,
)
from gradwire_coordinator.costs import LINK_BYTES_PER_SECOND, Rates
from gradwire_coordinator.graph_index import GraphIndex, can_need_gradient, value_bytes
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.simulator import LinkSeconds, StageSeconds
from gradwire_protocol.codecs import AUTO
from gradwire_protocol.errors import GradwireError, InternalError
from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2


def asked_codecs(plan: run_pb2.Plan) -> list[str]:
    """Return what a checked plan says of each boundary: the name of a codec, or "auto"."""
    asked = list(plan.activation_compression) or ["none"]
    boundaries = plan.stages * plan.virtual_stages - 1
    return asked if len(asked) == boundaries else asked[:1] * boundaries


def needs_links(plan: run_pb2.Plan) -> bool:
    """Whether links must be measured to carry a plan out."""
    return (plan.stages > 1 and AUTO in asked_codecs(plan)) or (plan.replicas > 1 and plan.compression == AUTO)


# By position of their ends; a link counts for both ways. Where there is none it was not measured.
Links = Mapping[tuple[int, int], LinkRate | GradwireError]
# What is assumed of a link that was not measured: nothing slow.
ASSUMED_LINK = LinkRate(LINK_BYTES_PER_SECOND, LINK_BYTES_PER_SECOND, 5e-4)


class Boundaries:
    """The boundaries of the train graph: number b is between stage b and b + 1, and has what b + 1 reads.

    Of that only what comes from another server, and is not there already for an earlier stage of the same one. Sizes
    are of one shard out of so many: of a value that is spread, of its part.
    """

    def __init__(
        self,
        index: GraphIndex,
        segments: Mapping[int, stage_pb2.Segment],
        placement: Placement,
        rows: int,
        shards: int = 1,
    ) -> None:
        self._index = index
        self._placement = placement
        self._rows = rows
        self._shards = shards
        outgoing = [made for segment in segments.values() for made in segment.outgoing]
        self._exact = {made.value for made in outgoing if made.exact}
        self._spread = {made.value for made in outgoing if made.HasField("spread_dimension")}
        read: list[list[Travelling]] = [[] for _ in placement]
        for segment in segments.values():
            for made in segment.outgoing:
                for reader in self._readers(segment.stage, made):
                    read[reader].append(self._travelling(made.value))
        self._read = [tuple(values) for values in read[1:]]

    def choose(
        self,
        asked: Sequence[str],
        programs: Sequence[Sequence[Action]],
        seconds: Sequence[StageSeconds],
        rates: Sequence[Rates],
        links: Links,
    ) -> list[Choice]:
        """Return the codec of each boundary. seconds: by stage; rates: by server.

        `links` may be left out where no codec is "auto"; within a server there is no codec.
        """
        if AUTO in asked and not links and max(self._placement) > 0:
            raise InternalError("Codecs are to be chosen, but the links were not measured")
        return choose_codecs(asked, programs, seconds, self._of_stages(rates), self._boundaries(links))

    def loaded(
        self, choices: Sequence[Choice], seconds: Sequence[StageSeconds], rates: Sequence[Rates], links: Links
    ) -> tuple[list[StageSeconds], list[LinkSeconds]]:
        """Return what stages take with encoding and decoding, and what the links between stage b and b + 1 take.

        Of a link that could not be measured the usual is assumed.
        """
        codecs = [choice.codec for choice in choices]
        boundaries = [
            replace(boundary, link=ASSUMED_LINK) if isinstance(boundary.link, GradwireError) else boundary
            for boundary in self._boundaries(links)
        ]
        return with_transfers(codecs, seconds, self._of_stages(rates), boundaries)

    @property
    def spread(self) -> list[list[Travelling]]:
        """Of each boundary: what is brought together from parts behind it, and in front of it on the way back."""
        return [[value for value in values if value.spread] for values in self._read]

    def leaving_bytes(self, segment: stage_pb2.Segment, choices: Sequence[Choice]) -> int:
        """Return the bytes that leave a stage's server forward for one micro-batch, as encoded."""
        return sum(
            travelling_bytes(self._travelling(made.value), choices[reader - 1].codec)
            for made in segment.outgoing
            for reader in self._readers(segment.stage, made)
        )

    def returned_bytes(self, segment: stage_pb2.Segment, choices: Sequence[Choice]) -> int:
        """Return the bytes of gradients that a stage sends to others for one micro-batch, as encoded."""
        return sum(
            travelling_bytes(value, choices[segment.stage - 1].codec)
            for value in (self._read[segment.stage - 1] if segment.stage else ())
            if value.has_gradient
        )

    def _readers(self, producer: int, made: stage_pb2.OutgoingValue) -> list[int]:
        """Return the stages that a value is sent to: the first reader on each other server."""
        place = self._placement
        first = {place[stage]: stage for stage in reversed(made.consumer_stages)}
        return sorted(stage for server, stage in first.items() if server != place[producer])

    def _boundaries(self, links: Links) -> list[Boundary]:
        ends = itertools.pairwise(self._placement)
        return [Boundary(values, link_between(links, *both)) for values, both in zip(self._read, ends, strict=True)]

    def _of_stages(self, rates: Sequence[Rates]) -> list[Rates]:
        return [rates[server] for server in self._placement]

    def _travelling(self, value: str) -> Travelling:
        spec = self._index.spec(value)
        spread = value in self._spread
        size = -(-value_bytes(spec, self._rows) // (self._shards if spread else 1))
        is_tensor = spec.kind == graph_pb2.VALUE_KIND_TENSOR and spec.data_type in ELEMENT_BYTES
        return Travelling(
            data_type=spec.data_type if is_tensor else 0,
            elements=size // ELEMENT_BYTES[spec.data_type] if is_tensor else 1,
            size_bytes=size,
            has_gradient=can_need_gradient(spec) and value not in self._exact,
            exact=value in self._exact,
            spread=spread,
        )


def link_between(links: Links, sender: int, receiver: int) -> LinkRate | GradwireError | None:
    """Return the link from one server to another; None within one."""
    if sender == receiver:
        return None
    if (sender, receiver) in links:
        return links[sender, receiver]
    back = links.get((receiver, sender), ASSUMED_LINK)
    return LinkRate(back.backward, back.forward, back.round_trip_seconds) if isinstance(back, LinkRate) else back
