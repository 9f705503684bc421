"""How `gradwire train` shows a job: a bar on a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from gradwire.boundaries import boundary_lines
from gradwire.job.reporter import Beginning, StepRecord, Validation
from gradwire.progress import ProgressBar
from gradwire.run_plan import grid_lines, module_names
from gradwire.units import shown_seconds

_LINE_SECONDS = 5.0


class JsonReporter:
    """One object a step, and a last one with the summary."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def begin(self, beginning: Beginning) -> None: ...

    def step(self, record: StepRecord) -> None:
        print(json.dumps(record.to_json()), flush=True)

    def validation(self, validation: Validation) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self, summary: dict[str, Any]) -> None:
        print(json.dumps(summary), flush=True)


class LineReporter:
    """A line every few seconds, and what matters besides."""

    def __init__(self) -> None:
        self._printed_at = 0.0
        self._steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def begin(self, beginning: Beginning) -> None:
        self._steps = beginning.steps
        for line in describe_beginning(beginning):
            self._print(line)

    def step(self, record: StepRecord) -> None:
        now = time.monotonic()
        if record.result.step > 1 and now - self._printed_at < _LINE_SECONDS:
            return
        self._printed_at = now
        result = record.result
        self._print(
            f"step {result.step}/{self._steps}  loss {result.loss:.4f}  {record.tokens_per_second:,.0f} tokens/s  "
            f"bubble {result.bubble:.1%}"
        )

    def validation(self, validation: Validation) -> None:
        self._print(describe_validation(validation))

    def note(self, text: str) -> None:
        self._print(text)

    def end(self, summary: dict[str, Any]) -> None:
        for line in describe_summary(summary):
            self._print(line)

    def _print(self, line: str) -> None:
        print(line, flush=True)


class BarReporter(LineReporter):
    """A progress bar on the terminal, with the lines that matter above it."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._bar = ProgressBar(steps, "training")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.finish()

    def begin(self, beginning: Beginning) -> None:
        super().begin(beginning)
        self._bar.start(beginning.steps_done)

    def step(self, record: StepRecord) -> None:
        self._bar.show(record.result, f"{record.tokens_per_second:,.0f} tokens/s")

    def end(self, summary: dict[str, Any]) -> None:
        self._bar.finish()
        super().end(summary)

    def _print(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)


def describe_beginning(beginning: Beginning) -> Iterator[str]:
    """Yield the lines that say what will be done."""
    plan = beginning.plan
    yield (
        f"text: {beginning.source}: {beginning.training_bytes:,} bytes for training, {beginning.validation_bytes:,} "
        f"held out; {beginning.steps:,} steps are {beginning.steps / beginning.steps_per_epoch:.2f} epochs"
    )
    yield (
        f"model: {beginning.parameters:,} parameters; schedule {plan.schedule}, {plan.micro_batches} micro-batches, "
        f"theoretical bubble {plan.theoretical_bubble_ratio:.1%}"
    )
    last = len(plan.stages) - 1
    for stage in plan.stages:
        first_module, last_module = module_names(plan, stage)
        sent = f", {stage.boundary_bytes / 2**20:.2f} MiB a step to later stages" if stage.stage < last else ""
        yield f"  stage {stage.stage}: {first_module} … {last_module}, {stage.parameters:,} parameters{sent}"
    for line in itertools.chain(boundary_lines(plan), grid_lines(plan)):
        yield f"  {line}"


def describe_validation(validation: Validation) -> str:
    return (
        f"after step {validation.step}: training loss {validation.training_loss:.4f} on average since the last "
        f"validation, validation loss {validation.validation_loss:.4f} nats a byte"
    )


def describe_summary(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that end a run: results, verdict, where to look next."""
    yield ""
    for epoch in summary["epochs"]:
        part = "" if epoch["completed"] >= 1 else f" ({epoch['completed']:.0%} of it)"
        yield f"epoch {epoch['epoch']}{part}: average training loss {epoch['training_loss']:.4f}"
    yield (
        f"validation loss: {summary['validation_loss']:.4f} nats a byte = {summary['bits_per_byte']:.4f} bits a byte"
    )
    yield f"rate: {summary['tokens_per_second']:,.0f} tokens/s, {summary['training_seconds']:.1f} s of training"
    yield (
        f"bubble: {summary['bubble']:.1%} measured; {summary['theoretical_bubble']:.1%} for {summary['schedule']} with "
        "equal stages"
    )
    if "predicted_step_seconds" in summary:
        yield (
            f"step: {shown_seconds(summary['step_seconds'])} measured, "
            f"{shown_seconds(summary['predicted_step_seconds'])} predicted; bubble {summary['simulated_bubble']:.1%} "
            "simulated"
        )
        for finding in summary["findings"]:
            yield f"  • {finding}"
    for check in summary.get("checks", ()):
        yield f"check in {check['text']}"
    yield f"verdict: {summary['verdict']}"
    yield "where to look next:"
    yield f"  gradwire sample {summary['run_directory']} --prompt 'def '"
    yield f"  {summary['run_directory']}: plan.json, report.txt, metrics.jsonl (each step), weights.safetensors"
