"""Averages over a run's steps: of the loss by epoch and by interval, of the bubble, of the rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gradwire.results import StepResult

# The first steps fill caches and buffers: they say nothing about the bubble.
_WARM_UP_STEPS = 2


@dataclass
class Mean:
    """An average that grows."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class Averages:
    """What the summary of a run needs of its steps. An epoch is one pass over the windows of the training text."""

    steps_per_epoch: int
    interval: Mean = field(default_factory=Mean)
    bubble: Mean = field(default_factory=Mean)
    training_seconds: float = 0.0
    _epochs: list[Mean] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        """Take a finished step."""
        while len(self._epochs) <= (result.step - 1) // self.steps_per_epoch:
            self._epochs.append(Mean())
        self._epochs[-1].add(result.loss)
        self.interval.add(result.loss)
        if result.step > _WARM_UP_STEPS:
            self.bubble.add(result.bubble)

    def close_interval(self) -> float:
        """Return the average loss since the last call."""
        average, self.interval = self.interval.value, Mean()
        return average

    def epochs(self) -> list[dict[str, Any]]:
        """Return each epoch's average training loss, and how much of the epoch the run covered."""
        return [
            {"epoch": number, "training_loss": mean.value, "completed": mean.count / self.steps_per_epoch}
            for number, mean in enumerate(self._epochs, 1)
        ]
