"""Keeps training steps in flight: the next is dispatched before the last one's result is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gradwire.batches import Batch, as_arguments
from gradwire.dispatch import Dispatched
from gradwire.results import StepResult, step_result
from gradwire_protocol.errors import OptimizerError, SettingsError


@dataclass(frozen=True)
class OpenStep:
    """A step that is dispatched."""

    step: int
    sent: Dispatched

    def wait(self) -> StepResult:
        """Return its result, when it is done."""
        return step_result(self.step, self.sent.rows, self.sent.future.result())


def check_loop(steps: int | None, scheduler: torch.optim.lr_scheduler.LRScheduler | None) -> None:
    """SettingsError or OptimizerError for a loop that cannot be."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise SettingsError("steps is not valid", expected="a whole number, 0 or more, or None", got=repr(steps))
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise OptimizerError(
            "ReduceLROnPlateau needs a metric, which is not known when a step is dispatched",
            remedy="leave scheduler out, and call scheduler.step(metric) yourself",
        )


def in_flight(
    batches: Iterable[Any],
    dispatch: Callable[[Batch], OpenStep],
    *,
    window: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    is_stopping: Callable[[], bool],
    stop: Callable[[], None],
) -> Iterator[StepResult]:
    """Yield the results of all batches in order, with up to `window` steps dispatched.

    scheduler: advanced behind each dispatch. When the run is to end before the batches do, the steps in flight come
    first, and then `stop` is called.
    """
    steps: deque[OpenStep] = deque()
    broken_off = False
    for batch in batches:
        if len(steps) == window:
            yield steps.popleft().wait()
        if is_stopping():
            broken_off = True
            break
        steps.append(dispatch(as_arguments(batch)))
        if scheduler is not None:
            scheduler.step()
    while steps:
        yield steps.popleft().wait()
    if broken_off:
        stop()
