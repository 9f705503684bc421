"""What a segment's values mean for one server: which messages to wait for, and where to send.

Worked out once, when a run is prepared, so that an action only looks up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gradwire_protocol.v1 import stage_pb2


@dataclass(frozen=True, slots=True)
class Input:
    """A value that a segment reads."""

    value: str
    from_batch: bool
    source_stage: int  # 0 for the batch
    gradient_to: tuple[str, ...]  # the server, where the gradient goes; empty for the batch
    gradient_from: int | None  # the stage whose gradient is added here
    readers: int  # segments of the same graph on this server that read this message


@dataclass(frozen=True, slots=True)
class Output:
    """A value that a segment makes for others."""

    value: str
    servers: tuple[str, ...]
    gradient_from: int  # the first consumer's stage


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
    return {
        (segment.graph, segment.stage): Routes(
            inputs=tuple(
                Input(
                    value=value.value,
                    from_batch=value.from_batch,
                    source_stage=_source(value),
                    gradient_to=() if value.from_batch else (server_of_stage[value.gradient_to_stage],),
                    gradient_from=value.gradient_from_stage if value.HasField("gradient_from_stage") else None,
                    readers=readers[segment.graph, value.from_batch, _source(value), value.value],
                )
                for value in segment.incoming
            ),
            outputs=tuple(
                Output(
                    value=made.value,
                    servers=tuple(dict.fromkeys(server_of_stage[stage] for stage in made.consumer_stages)),
                    gradient_from=made.consumer_stages[0],
                )
                for made in segment.outgoing
            ),
        )
        for segment in request.segments
    }
