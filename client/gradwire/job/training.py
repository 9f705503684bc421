"""The main job: trains the GPT on a cluster, validates it, writes its run directory, and checks one step for equality.

Leaves starting a cluster, and showing what happens, to the command line.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from gradwire.cluster import Cluster
from gradwire.job.averages import Averages
from gradwire.job.gpt import GPT, Shape, make_optimizer, next_byte_loss
from gradwire.job.reporter import Beginning, Reporter, StepRecord, Validation
from gradwire.job.run_directory import RunDirectory
from gradwire.job.settings import JobSettings
from gradwire.job.text import Windows, load_text, validation_batches
from gradwire.plan import Plan
from gradwire.trainer import Trainer
from gradwire.verification import Verification, verify

# The cosine ends at this share of the peak learning rate.
_FINAL_LR_SHARE = 0.1
_CHECK_ROWS_PER_MICRO_BATCH = 2


class Job:
    """The job before it has a cluster: settings, text, model, optimizer, schedule of the learning rate."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._text = load_text(settings.data, settings.context + 1)
        self._windows = Windows(self._text.training, context=settings.context, batch=settings.batch, seed=settings.seed)
        self._validation = validation_batches(
            self._text.validation,
            context=settings.context,
            batch=settings.batch,
            windows=settings.validation_windows,
        )
        torch.manual_seed(settings.seed)
        shape = Shape(layers=settings.layers, width=settings.width, heads=settings.heads, context=settings.context)
        self._model = GPT(shape)
        self._optimizer = make_optimizer(self._model, lr=settings.lr, weight_decay=settings.weight_decay)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._lr_share)
        self._plan = Plan(
            stages=settings.stages,
            microbatches=settings.microbatches,
            schedule=settings.schedule,
            window=settings.window,
        )

    def run(self, cluster: Cluster, directory: RunDirectory, reporter: Reporter, started_at: float) -> dict[str, Any]:
        """Train, validate, write, check; return the summary. started_at: time.monotonic() of the command's start."""
        settings = self._settings
        directory.write_settings(settings.model_dump())
        averages = Averages(len(self._windows))
        with cluster.trainer(
            self._model,
            self._optimizer,
            loss=next_byte_loss,
            example=self._example(settings.batch),
            plan=self._plan,
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
            description=f"GPT, {settings.layers} layers of {settings.width}",
        ) as trainer:
            plan = trainer.plan
            directory.write_plan(plan)
            reporter.begin(
                Beginning(
                    source=self._text.source,
                    training_bytes=len(self._text.training),
                    validation_bytes=len(self._text.validation),
                    parameters=sum(parameter.numel() for parameter in self._model.parameters()),
                    steps=settings.steps,
                    steps_per_epoch=len(self._windows),
                    plan=plan,
                )
            )
            validations, startup_seconds = self._train(trainer, averages, directory, reporter, started_at)
            state = trainer.state_dict()
        weights = directory.write_weights(state)
        self._model.load_state_dict(state)
        loss = validations[-1].validation_loss
        tokens = self._tokens(settings.steps)
        summary: dict[str, Any] = {
            "steps": settings.steps,
            "epochs": averages.epochs(),
            "validation_loss": loss,
            "bits_per_byte": loss / math.log(2),
            "tokens": tokens,
            "tokens_per_second": tokens / averages.training_seconds,
            "training_seconds": averages.training_seconds,
            "startup_seconds": startup_seconds,
            "bubble": averages.bubble.value,
            "theoretical_bubble": plan.theoretical_bubble_ratio,
            "schedule": plan.schedule,
            "run_directory": str(directory.path),
            "weights": str(weights),
            "verdict": "not checked",
        }
        if settings.check:
            reporter.note("comparing one step with one process …")
            checks = self._check(cluster)
            summary["verdict"] = "equal" if all(check.equal for check in checks) else "different"
            summary["checks"] = [_check_record(check) for check in checks]
        directory.write_summary(summary)
        reporter.end(summary)
        return summary

    def _train(
        self, trainer: Trainer, averages: Averages, directory: RunDirectory, reporter: Reporter, started_at: float
    ) -> tuple[list[Validation], float]:
        settings = self._settings
        batches = self._endless()
        validations: list[Validation] = []
        startup_seconds = 0.0
        done = 0
        while done < settings.steps:
            interval = min(settings.evaluate_every, settings.steps - done)
            began = time.monotonic()
            for result in trainer.run(batches, steps=interval, scheduler=self._scheduler, progress=False):
                startup_seconds = startup_seconds or time.monotonic() - started_at
                averages.add(result)
                record = StepRecord(
                    result=result,
                    tokens_per_second=result.samples_per_second * settings.context,
                    learning_rate=settings.lr * self._lr_share(result.step - 1),
                )
                directory.append_metrics(record.to_json())
                reporter.step(record)
            averages.training_seconds += time.monotonic() - began
            done += interval
            validation = Validation(
                step=done,
                training_loss=averages.close_interval(),
                validation_loss=trainer.evaluate(self._validation),
            )
            validations.append(validation)
            directory.append_metrics(validation.to_json())
            reporter.validation(validation)
        return validations, startup_seconds

    def _endless(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from self._windows

    def _example(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, self._settings.context)
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)

    def _lr_share(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0: linear warm-up, then a cosine."""
        warm_up, steps = self._settings.warmup_steps, self._settings.steps
        if step < warm_up:
            return (step + 1) / warm_up
        progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return _FINAL_LR_SHARE + (1 - _FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))

    def _tokens(self, steps: int) -> int:
        """Tokens of the first steps; the last batch of an epoch may be smaller."""
        windows, in_epoch = self._windows.windows, len(self._windows)
        epochs, rest = divmod(steps, in_epoch)
        return (epochs * windows + rest * self._settings.batch) * self._settings.context

    def _check(self, cluster: Cluster) -> list[Verification]:
        """Compare one step in the model's own type, and one in float64, which also judges the updated weights."""
        settings = self._settings
        rows = min(settings.batch, settings.microbatches * _CHECK_ROWS_PER_MICRO_BATCH)
        x, y = self._validation[0]
        checks = []
        for data_type in (torch.float32, torch.float64):
            checks.append(
                verify(
                    cluster,
                    copy.deepcopy(self._model).to(data_type),
                    lambda model: make_optimizer(model, lr=settings.lr, weight_decay=settings.weight_decay),
                    loss=next_byte_loss,
                    batch=(x[:rows], y[:rows]),
                    plan=self._plan,
                    max_grad_norm=settings.max_grad_norm,
                )
            )
        return checks


def _check_record(check: Verification) -> dict[str, Any]:
    return {
        "data_type": check.data_type,
        "equal": check.equal,
        "loss_difference": check.loss_difference,
        "gradient_difference": check.gradient_difference,
        "weight_difference": check.weight_difference,
        "weights_judged": check.weights_judged,
        "tolerance": check.tolerance,
        "text": str(check),
    }
