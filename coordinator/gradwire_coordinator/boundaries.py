"""What crosses each boundary of a cut model, and under which codec.

Pure. Leaves to others: cutting (`segments.py`), and choosing what the plan leaves open (`codec_choice.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_coordinator.codec_choice import Boundary, Choice, Travelling, choose_codecs, travelling_bytes
from gradwire_coordinator.costs import Rates
from gradwire_coordinator.graph_index import GraphIndex, can_need_gradient, value_bytes
from gradwire_coordinator.link_rates import LinkRate
from gradwire_protocol.codecs import AUTO
from gradwire_protocol.errors import GradwireError, InternalError
from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2


def asked_codecs(plan: run_pb2.Plan) -> list[str]:
    """Return what a checked plan says of each boundary: the name of a codec, or "auto"."""
    asked = list(plan.activation_compression) or ["none"]
    return asked if len(asked) == plan.stages - 1 else asked[:1] * (plan.stages - 1)


def needs_links(plan: run_pb2.Plan) -> bool:
    """Whether links must be measured to carry a plan out."""
    return AUTO in asked_codecs(plan)


class Boundaries:
    """The boundaries of the train graph: number b is between stage b and b + 1, and has what b + 1 reads."""

    def __init__(self, index: GraphIndex, segments: dict[int, stage_pb2.Segment], stages: int, rows: int) -> None:
        self._index = index
        self._rows = rows
        self._exact = {made.value for segment in segments.values() for made in segment.outgoing if made.exact}
        self._read = [
            tuple(
                self._travelling(value.value)
                for value in (segments[stage].incoming if stage in segments else ())
                if not value.from_batch
            )
            for stage in range(1, stages)
        ]

    def choose(
        self,
        asked: Sequence[str],
        programs: Sequence[Sequence[Action]],
        seconds: Sequence[float],
        rates: Sequence[Rates],
        links: Sequence[LinkRate | GradwireError],
    ) -> list[Choice]:
        """Return the codec of each boundary; `links` may be left out where no codec is "auto"."""
        if AUTO not in asked:
            return [Choice(codec) for codec in asked]
        if len(links) != len(asked):
            raise InternalError("Codecs are to be chosen, but the links were not measured", got=f"{len(links)} links")
        boundaries = [Boundary(values, link) for values, link in zip(self._read, links, strict=True)]
        return choose_codecs(asked, programs, seconds, rates, boundaries)

    def leaving_bytes(self, segment: stage_pb2.Segment, choices: Sequence[Choice]) -> int:
        """Return the bytes that leave a stage forward for one micro-batch, as encoded."""
        return sum(
            travelling_bytes(self._travelling(made.value), choices[consumer - 1].codec)
            for made in segment.outgoing
            for consumer in made.consumer_stages
        )

    def _travelling(self, value: str) -> Travelling:
        spec = self._index.spec(value)
        size = value_bytes(spec, self._rows)
        is_tensor = spec.kind == graph_pb2.VALUE_KIND_TENSOR and spec.data_type in ELEMENT_BYTES
        return Travelling(
            data_type=spec.data_type if is_tensor else 0,
            elements=size // ELEMENT_BYTES[spec.data_type] if is_tensor else 1,
            size_bytes=size,
            has_gradient=can_need_gradient(spec) and value not in self._exact,
            exact=value in self._exact,
        )
