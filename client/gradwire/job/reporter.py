"""What the main job tells while it runs; the command line shows it on a terminal, as lines, or as JSON."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from gradwire.results import StepResult
from gradwire.run_plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What is known before the first step."""

    source: str
    training_bytes: int
    validation_bytes: int
    parameters: int
    steps: int
    steps_per_epoch: int
    # Steps that an interrupted run had done.
    steps_done: int
    plan: RunPlan


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step, as the metrics file has it."""

    result: StepResult
    tokens_per_second: float
    learning_rate: float

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.result.step,
            "loss": self.result.loss,
            "seconds": self.result.seconds,
            "bubble": self.result.bubble,
            "tokens_per_second": self.tokens_per_second,
            "gradient_norm": self.result.gradient_norm,
            "learning_rate": self.learning_rate,
        }


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The held-out loss after a step, beside the average training loss since the last one."""

    step: int
    training_loss: float
    validation_loss: float

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "training_loss": self.training_loss, "validation_loss": self.validation_loss}


class Reporter(AbstractContextManager["Reporter"], Protocol):
    """Takes what happens, in order."""

    def begin(self, beginning: Beginning) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def validation(self, validation: Validation) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self, summary: dict[str, Any]) -> None: ...
