"""What a training step gives back to the user's loop."""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_protocol.v1 import run_pb2


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One finished training step.

    step: counts from 1. loss: over the whole batch, before the update. seconds: from the first server's start to the
    last server's end. bubble: idle share of the step, measured, averaged over the servers. gradient_norm: before
    clipping; None without `max_grad_norm`.
    """

    step: int
    loss: float
    seconds: float
    bubble: float
    samples_per_second: float
    gradient_norm: float | None = None


def idle_share(result: run_pb2.EntryResult) -> float:
    """Return idle ÷ window of an entry, averaged over its servers; 0.0 where nothing was measured."""
    shares = [
        sum(timing.idle_seconds.values()) / timing.window_seconds
        for timing in result.timings.values()
        if timing.window_seconds > 0
    ]
    return sum(shares) / len(shares) if shares else 0.0


def step_result(step: int, rows: int, result: run_pb2.EntryResult) -> StepResult:
    return StepResult(
        step=step,
        loss=result.loss,
        seconds=result.seconds,
        bubble=idle_share(result),
        samples_per_second=rows / result.seconds if result.seconds > 0 else 0.0,
        gradient_norm=result.gradient_norm if result.HasField("gradient_norm") else None,
    )
