"""Open entries, and how reports become results."""

from __future__ import annotations

import math

import pytest

from gradwire_coordinator.window import Window
from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import run_pb2


def step(number: int, micro_batches: int = 1) -> run_pb2.Entry:
    parts = [run_pb2.MicroBatch(index=index, rows=1) for index in range(micro_batches)]
    return run_pb2.Entry(number=number, generation=1, train_step=run_pb2.TrainStep(step=number, micro_batches=parts))


def report(entry: int, *losses: tuple[int, float, float], **fields: object) -> run_pb2.EntryReport:
    made = run_pb2.EntryReport(entry=entry, generation=1, **fields)  # type: ignore[arg-type]
    for micro_batch, total, weight in losses:
        made.losses.add(micro_batch=micro_batch, sum=total, weight=weight)
    return made


def test_seconds_run_from_the_first_servers_start_to_the_last_ones_end() -> None:
    window = Window(["a", "b"], loss_from={1: 0})
    window.add(step(1), 10.0)
    window.add(step(2), 11.0)
    assert window.report(0, report(1), 14.0) is None
    finished = window.report(1, report(1, (0, 1.0, 1.0)), 17.0)
    assert finished is not None
    assert finished[1].seconds == 7.0  # from its dispatch
    assert len(window) == 1
    assert window.report(0, report(2), 18.0) is None
    finished = window.report(1, report(2, (0, 1.0, 1.0)), 20.0)
    assert finished is not None
    assert finished[1].seconds == 6.0  # server a began it when it had finished entry 1, at 14


def test_losses_come_from_the_server_of_the_last_stage() -> None:
    window = Window(["a", "b"], loss_from={0: 0})
    window.add(step(1), 0.0)
    window.add(step(2), 0.0)
    assert window.report(0, report(1, (0, 2.0, 1.0)), 1.0) is None
    finished = window.report(1, report(1), 2.0)
    assert finished is not None
    assert finished[1].loss == 2.0
    with pytest.raises(FrameError, match="wrong losses"):
        window.report(1, report(2, (0, 2.0, 1.0)), 3.0)


def test_the_loss_is_summed_in_micro_batch_order_and_divided_once() -> None:
    window = Window(["a"], loss_from={0: 0})
    window.add(step(1, 3), 0.0)
    parts = [(2, -1e16, 1.0), (0, 1.0, 2.0), (1, 1e16, 1.0)]  # the order of the sum shows in its rounding
    finished = window.report(0, report(1, *parts, gradient_norm=3.5, weight_version=9), 1.0)
    assert finished is not None
    result = finished[1]
    assert result.loss == ((1.0 + 1e16) - 1e16) / 4.0
    assert (result.weight, result.gradient_norm, result.weight_version) == (4.0, 3.5, 9)


def test_a_batch_that_is_masked_out_has_no_loss() -> None:
    window = Window(["a"], loss_from={0: 0})
    window.add(step(1), 0.0)
    finished = window.report(0, report(1, (0, 0.0, 0.0)), 1.0)
    assert finished is not None
    assert math.isnan(finished[1].loss)


def test_owed_entries() -> None:
    window = Window(["a", "b"], loss_from={1: 0})
    assert window.owed_by(0) is None
    window.add(step(1), 0.0)
    window.add(step(2), 0.0)
    window.report(0, report(1), 1.0)
    assert [window.owed_by(stage).number for stage in (0, 1)] == [2, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("stage", "bad", "part"),
    [
        (0, report(2), "out of order"),
        (0, run_pb2.EntryReport(entry=1, generation=2), "out of order"),
        (0, report(1, (0, 1.0, 1.0)), "wrong losses"),  # not the last stage
        (1, report(1), "wrong losses"),
        (1, report(1, (0, 1.0, 1.0), (0, 1.0, 1.0)), "wrong losses"),
        (1, report(1, (1, 1.0, 1.0)), "wrong losses"),
    ],
)
def test_reports_that_are_not_owed_are_refused(stage: int, bad: run_pb2.EntryReport, part: str) -> None:
    window = Window(["a", "b"], loss_from={1: 0})
    window.add(step(1), 0.0)
    with pytest.raises(FrameError, match=part):
        window.report(stage, bad, 1.0)


def test_a_report_of_nothing_is_refused() -> None:
    with pytest.raises(FrameError, match="not sent"):
        Window(["a"], loss_from={0: 0}).report(0, report(1), 1.0)


def test_the_oldest_entry_counts_from_when_it_became_the_oldest() -> None:
    window = Window(["a", "b"], loss_from={1: 0})
    assert window.oldest(5.0) is None
    assert window.owed_seconds(0, 5.0) == 0.0
    window.add(step(1), 10.0)
    window.add(step(2), 11.0)
    assert window.oldest(12.0) == (step(1), 2.0)
    window.report(0, report(1), 14.0)
    assert (window.owed_seconds(0, 16.0), window.owed_seconds(1, 16.0)) == (5.0, 6.0)
    window.report(1, report(1, (0, 1.0, 1.0)), 17.0)
    assert window.oldest(18.0) == (step(2), 1.0)


def test_each_replicas_last_server_reports_the_losses_of_its_own_micro_batches() -> None:
    window = Window(["a", "b"], loss_from={0: 0, 1: 1})
    entry = step(1, 3)
    entry.train_step.micro_batches[1].replica = 1
    window.add(entry, 0.0)
    window.add(step(2), 0.0)
    assert window.report(1, report(1, (1, 1e16, 1.0)), 1.0) is None
    finished = window.report(0, report(1, (2, -1e16, 1.0), (0, 1.0, 2.0)), 2.0)
    assert finished is not None
    # In micro-batch order over all replicas, which shows in the rounding.
    assert finished[1].loss == ((1.0 + 1e16) - 1e16) / 4.0
    # The second replica has no micro-batch of this step.
    with pytest.raises(FrameError, match="wrong losses"):
        window.report(1, report(2, (0, 1.0, 1.0)), 3.0)
    assert window.report(1, report(2), 3.0) is None


def test_other_shards_report_the_same_losses_and_are_not_counted() -> None:
    window = Window(["a", "b", "c"], loss_from={1: 0}, loss_copies={2: 0})
    window.add(step(1), 0.0)
    window.add(step(2), 0.0)
    assert window.report(2, report(1, (0, 3.0, 1.5)), 1.0) is None
    assert window.report(0, report(1), 2.0) is None
    finished = window.report(1, report(1, (0, 3.0, 1.5)), 3.0)
    assert finished is not None
    assert (finished[1].loss, finished[1].weight) == (2.0, 1.5)
    assert finished[1].timings.keys() == {"a", "b", "c"}
    with pytest.raises(FrameError, match="wrong losses"):
        window.report(2, report(2), 4.0)
