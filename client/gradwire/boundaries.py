"""A plan's boundaries in words: which codec values travel under between two stages, and why."""

from __future__ import annotations

from collections.abc import Iterator

from gradwire.run_plan import RunPlan


def boundary_lines(plan: RunPlan) -> Iterator[str]:
    """Yield a line for each boundary that has a codec, or whose codec was chosen: "boundary 0→1: int8, link 9.6 …"."""
    for stage in plan.stages[:-1]:
        if stage.codec_reason or stage.codec != "none":
            reason = f", {stage.codec_reason}" if stage.codec_reason else ""
            yield f"boundary {stage.stage}→{stage.stage + 1}: {stage.codec}{reason}"
