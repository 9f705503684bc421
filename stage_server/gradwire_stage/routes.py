"""What a segment's values mean for one server: which messages to wait for, and where to send.

Worked out once, when a run is prepared, so that an action only looks up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb


@dataclass(frozen=True, slots=True)
class Input:
    """A value that a segment reads."""

    value: str
    from_batch: bool
    source_stage: int  # 0 for the batch
    gradient_to: tuple[str, ...]  # the server, where the gradient goes; empty for the batch
    gradient_codecs: Mapping[str, pb.Codec]  # by that server
    gradient_from: int | None  # the stage whose gradient is added here
    readers: int  # segments of the same graph on this server that read this message
    spread: int | None  # the dimension of which it travels in parts, and its gradient; None: as it is


@dataclass(frozen=True, slots=True)
class Output:
    """A value that a segment makes for others."""

    value: str
    servers: tuple[str, ...]
    codecs: Mapping[str, pb.Codec]  # by server
    gradient_from: int  # the first consumer's stage
    spread: int | None  # as of an input


@dataclass(frozen=True, slots=True)
class Routes:
    """All routes of one segment."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]


def _source(value: stage_pb2.IncomingValue) -> int:
    return 0 if value.from_batch else value.producer_stage


def routes_of(request: stage_pb2.PrepareRequest, server_of_stage: Mapping[int, str]) -> dict[tuple[int, int], Routes]:
    """Return the routes of every segment, by graph and stage."""
    readers = Counter(
        (segment.graph, value.from_batch, _source(value), value.value)
        for segment in request.segments
        for value in segment.incoming
    )
    # Of what a stage reads of stages before it, by that stage.
    codec_of_stage = dict(enumerate(request.activation_codecs, start=1))

    def codecs(stages: Iterable[int], reader: int | None = None) -> dict[str, pb.Codec]:
        """Return the codec for each stage's server; `reader`: of the value, if that is not the stage itself."""
        found: dict[str, pb.Codec] = {}
        for stage in stages:
            codec = codec_of_stage.get(stage if reader is None else reader, pb.CODEC_NONE)
            found.setdefault(server_of_stage[stage], codec)
        return found

    return {
        (segment.graph, segment.stage): Routes(
            inputs=tuple(
                Input(
                    value=value.value,
                    from_batch=value.from_batch,
                    source_stage=_source(value),
                    gradient_to=() if value.from_batch else (server_of_stage[value.gradient_to_stage],),
                    gradient_codecs={} if value.from_batch else codecs([value.gradient_to_stage], segment.stage),
                    gradient_from=value.gradient_from_stage if value.HasField("gradient_from_stage") else None,
                    readers=readers[segment.graph, value.from_batch, _source(value), value.value],
                    spread=value.spread_dimension if value.HasField("spread_dimension") else None,
                )
                for value in segment.incoming
            ),
            outputs=tuple(
                Output(
                    value=made.value,
                    servers=tuple(dict.fromkeys(server_of_stage[stage] for stage in made.consumer_stages)),
                    codecs={} if made.exact else codecs(made.consumer_stages),
                    gradient_from=made.consumer_stages[0],
                    spread=made.spread_dimension if made.HasField("spread_dimension") else None,
                )
                for made in segment.outgoing
            ),
        )
        for segment in request.segments
    }
