from __future__ import annotations

import pytest

from gradwire.job.averages import Averages
from gradwire.results import StepResult, idle_share, step_result
from gradwire_protocol.v1 import run_pb2


def timing(window: float, **idle: float) -> run_pb2.Timing:
    return run_pb2.Timing(window_seconds=window, idle_seconds={key.replace("_", "-"): v for key, v in idle.items()})


def test_the_bubble_is_the_idle_share_averaged_over_servers() -> None:
    result = run_pb2.EntryResult(
        timings={
            "a": timing(2.0, wait_activation=0.5, wait_gradient=0.5),
            "b": timing(1.0, wait_batch=0.1),
            "c": run_pb2.Timing(),
        }
    )
    assert idle_share(result) == pytest.approx((0.5 + 0.1) / 2)
    assert idle_share(run_pb2.EntryResult()) == 0.0


def test_a_step_result_has_what_the_entry_says() -> None:
    result = run_pb2.EntryResult(loss=1.5, seconds=0.5, gradient_norm=2.0, timings={"a": timing(1.0)})
    assert step_result(3, 8, result) == StepResult(
        step=3, loss=1.5, seconds=0.5, bubble=0.0, samples_per_second=16.0, gradient_norm=2.0
    )
    assert step_result(1, 8, run_pb2.EntryResult(loss=1.0)).gradient_norm is None


def one(step: int, loss: float, bubble: float) -> StepResult:
    return StepResult(step=step, loss=loss, seconds=1.0, bubble=bubble, samples_per_second=1.0)


def test_averages_by_epoch_and_interval_without_warm_up() -> None:
    averages = Averages(steps_per_epoch=3)
    for step, loss in enumerate([6.0, 5.0, 4.0, 2.0], 1):
        averages.add(one(step, loss, 0.9 if step <= 2 else 0.1))
    assert averages.epochs() == [
        {"epoch": 1, "training_loss": 5.0, "completed": 1.0},
        {"epoch": 2, "training_loss": 2.0, "completed": pytest.approx(1 / 3)},
    ]
    assert averages.bubble.value == pytest.approx(0.1)
    assert averages.close_interval() == pytest.approx(17 / 4)
    averages.add(one(5, 1.0, 0.1))
    assert averages.close_interval() == 1.0
