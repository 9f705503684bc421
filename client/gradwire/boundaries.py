"""A plan's boundaries in words: which codec values travel under between two stages, and why."""

from __future__ import annotations

from collections.abc import Iterator

from gradwire_protocol.codecs import NAME_OF_CODEC
from gradwire_protocol.v1 import coordinator_pb2, tensors_pb2


def boundary_lines(plan: coordinator_pb2.PlanSummary) -> Iterator[str]:
    """Yield a line for each boundary that has a codec, or whose codec was chosen: "boundary 0→1: int8, link 9.6 …"."""
    for stage in plan.stages[:-1]:
        if stage.codec_reason or stage.codec not in (tensors_pb2.CODEC_NONE, tensors_pb2.CODEC_UNSPECIFIED):
            reason = f", {stage.codec_reason}" if stage.codec_reason else ""
            name = NAME_OF_CODEC.get(stage.codec, "none")
            yield f"boundary {stage.stage}→{stage.stage + 1}: {name}{reason}"
