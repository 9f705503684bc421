"""What the command prints: errors as short blocks, a job's beginning and summary as lines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from gradwire.cli.app import WRONG_INPUT, describe
from gradwire.cli.reporters import JsonReporter, LineReporter
from gradwire.job.reporter import Beginning, StepRecord, Validation
from gradwire.progress import ProgressBar
from gradwire.results import StepResult
from gradwire.run_plan import RunPlan
from gradwire_protocol.errors import DataError, PlanError, StageFailed, Unreachable
from gradwire_protocol.v1 import coordinator_pb2, tensors_pb2

BEGINNING = Beginning(
    source="a book",
    training_bytes=9000,
    validation_bytes=1000,
    parameters=1234,
    steps=10,
    steps_per_epoch=20,
    steps_done=0,
    plan=RunPlan.from_proto(
        coordinator_pb2.PlanSummary(
            schedule="1f1b",
            micro_batches=8,
            theoretical_bubble_ratio=1 / 9,
            stages=[
                coordinator_pb2.StageSummary(
                    stage=0,
                    first_module="embedding",
                    last_module="blocks.1",
                    codec=tensors_pb2.CODEC_INT8,
                    codec_reason="link 9.6 Mbit/s",
                ),
                coordinator_pb2.StageSummary(stage=1),
            ],
        )
    ),
)
SUMMARY: dict[str, Any] = {
    "epochs": [
        {"epoch": 1, "training_loss": 3.0, "completed": 1.0},
        {"epoch": 2, "training_loss": 2.0, "completed": 0.25},
    ],
    "validation_loss": 2.0,
    "bits_per_byte": 2.885,
    "tokens_per_second": 12345.0,
    "training_seconds": 60.0,
    "bubble": 0.15,
    "theoretical_bubble": 1 / 9,
    "schedule": "1f1b",
    "run_directory": "runs/a",
    "verdict": "equal",
    "checks": [{"text": "float64: equal to one process"}],
}


def record(step: int) -> StepRecord:
    result = StepResult(step=step, loss=2.5, seconds=0.5, bubble=0.2, samples_per_second=64.0, gradient_norm=None)
    return StepRecord(result=result, tokens_per_second=8192.0, learning_rate=0.001)


def test_an_error_is_a_block_with_its_parts_and_notes() -> None:
    error = PlanError("It cannot be", expected="this", got="line one\nline two", remedy="do so")
    error.add_note("The logs are in /there")
    assert describe(error).splitlines() == [
        "Error: It cannot be",
        "  expected: this",
        "  got:      line one",
        "            line two",
        "  remedy:   do so",
        "  The logs are in /there",
    ]
    assert describe(DataError("Nothing")) == "Error: Nothing"


def test_exit_codes_tell_wrong_input_from_failures() -> None:
    assert isinstance(PlanError(""), WRONG_INPUT)
    assert not isinstance(StageFailed(""), WRONG_INPUT)
    assert not isinstance(Unreachable(""), WRONG_INPUT)


def test_lines_are_few_but_say_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    with LineReporter() as reporter:
        reporter.begin(BEGINNING)
        for step in range(1, 11):
            reporter.step(record(step))
        reporter.validation(Validation(step=10, training_loss=2.6, validation_loss=2.4))
        reporter.end(SUMMARY)
    out = capsys.readouterr().out
    assert out.count("loss 2.5000") == 1  # the first; the others came too soon after it
    for expected in (
        "a book: 9,000 bytes for training, 1,000 held out; 10 steps are 0.50 epochs",
        "theoretical bubble 11.1%",
        "stage 0: embedding … blocks.1",
        "boundary 0→1: int8, link 9.6 Mbit/s",
        "after step 10: training loss 2.6000",
        "epoch 1: average training loss 3.0000",
        "epoch 2 (25% of it): average training loss 2.0000",
        "2.0000 nats a byte = 2.8850 bits a byte",
        "bubble: 15.0% measured; 11.1% for",
        "check in float64: equal to one process",
        "verdict: equal",
        "gradwire sample runs/a",
    ):
        assert expected in out


def test_json_is_one_object_a_step_and_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonReporter() as reporter:
        reporter.begin(BEGINNING)
        reporter.step(record(1))
        reporter.step(record(2))
        reporter.validation(Validation(step=2, training_loss=2.6, validation_loss=2.4))
        reporter.note("something")
        reporter.end(SUMMARY)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("step") for line in lines] == [1, 2, None]
    assert lines[0]["learning_rate"] == 0.001
    assert lines[-1] == SUMMARY


def test_the_bar_can_be_finished_before_its_block_ends() -> None:
    with ProgressBar(3) as bar:
        bar.show(record(1).result)
        bar.finish()
        bar.finish()


def test_an_interrupt_that_foreign_code_turns_into_another_error_is_an_interrupt_all_the_same() -> None:
    program = """
import os, signal, sys, types

def run():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise RecursionError("as numpy's import does") from None

sys.modules["gradwire.cli.app"] = types.SimpleNamespace(run=run)
from gradwire.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")
