"""The main job: trains the GPT on a cluster, validates it, writes its run directory, and checks one step for equality.

Leaves starting a cluster, and showing what happens, to the command line.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradwire.cluster import Cluster
from gradwire.job.averages import Averages
from gradwire.job.checkpoints import JobCheckpoints, check_position
from gradwire.job.gpt import GPT, Shape, make_optimizer, next_byte_loss
from gradwire.job.reporter import Beginning, Reporter, StepRecord, Validation
from gradwire.job.run_directory import RunDirectory
from gradwire.job.settings import JobSettings, plan_of
from gradwire.job.text import Windows, load_text, validation_batches
from gradwire.results import StepResult
from gradwire.trainer import Trainer
from gradwire.verification import Verification, verify
from gradwire_protocol.checkpoint.manifest import read_manifest
from gradwire_protocol.exchanges import parse_exchange

# The cosine ends at this share of the peak learning rate.
_FINAL_LR_SHARE = 0.1
_CHECK_ROWS_PER_MICRO_BATCH = 2


@dataclass
class _Progress:
    """How far the job is, and what it has measured."""

    averages: Averages
    done: int = 0
    validated: int = 0
    validation_loss: float = math.nan
    startup_seconds: float = 0.0

    def replay(self, record: Mapping[str, Any]) -> None:
        """Take a record of the metrics file from before the job was interrupted."""
        if "validation_loss" in record:
            self.validated, self.validation_loss = record["step"], record["validation_loss"]
            self.averages.close_interval()
            return
        self.averages.add(
            StepResult(
                step=record["step"],
                loss=record["loss"],
                seconds=record["seconds"],
                bubble=record["bubble"],
                samples_per_second=0.0,
            )
        )


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
        self._plan = plan_of(settings)
        self._trainer: Trainer | None = None
        self._stop_reason = ""
        self._trained = False

    def request_stop(self, reason: str) -> bool:
        """Have the training end before its next step; return whether there is any. From any thread or signal."""
        self._stop_reason = reason
        if self._trainer is not None:
            self._trainer.request_stop(reason)
        return not self._trained

    def run(
        self,
        cluster: Cluster,
        directory: RunDirectory,
        reporter: Reporter,
        started_at: float,
        *,
        resume: bool = False,
    ) -> dict[str, Any]:
        """Train, validate, write, check; return the summary. started_at: time.monotonic() of the command's start.

        resume: go on from the newest whole checkpoint in the directory. Stopping if the training is to end before its
        last step; there is a checkpoint then, unless a note says why not.
        """
        settings = self._settings
        checkpoints = JobCheckpoints(
            directory.checkpoints, every=settings.save_every, keep=settings.keep_checkpoints, note=reporter.note
        )
        newest = checkpoints.newest() if resume else None
        if newest is not None:
            self._check_position(newest)
        directory.write_settings(settings.model_dump())
        progress = _Progress(Averages(len(self._windows)))
        with cluster.trainer(
            self._model,
            self._optimizer,
            loss=next_byte_loss,
            example=self._example(settings.batch),
            plan=self._plan,
            seed=settings.seed,
            max_grad_norm=settings.max_grad_norm,
            precision=settings.precision,
            description=f"GPT, {settings.layers} layers of {settings.width}",
            on_stop=lambda trainer: checkpoints.save_now(
                trainer, trainer.steps_done, self._windows.position(trainer.steps_done)
            ),
        ) as trainer:
            self._trainer = trainer
            if self._stop_reason:
                trainer.request_stop(self._stop_reason)
            if newest is not None:
                self._resume(trainer, newest, directory, progress)
                reporter.note(f"going on after step {progress.done}, from {newest}")
            begin = progress.done
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
                    steps_done=begin,
                    plan=plan,
                )
            )
            self._train(trainer, checkpoints, progress, directory, reporter, started_at)
            checkpoints.finish(trainer, progress.done, self._windows.position(progress.done))
            # Of the first step of a run nothing is reported.
            report = trainer.report() if progress.done - begin > 1 else None
            state = trainer.state_dict()
            self._trained = True  # nothing is lost from here on
        weights = directory.write_weights(state)
        self._model.load_state_dict(state)
        averages = progress.averages
        loss = progress.validation_loss
        tokens = self._tokens(progress.done)
        seconds = averages.training_seconds
        summary: dict[str, Any] = {
            "steps": progress.done,
            "epochs": averages.epochs(),
            "validation_loss": loss,
            "bits_per_byte": loss / math.log(2),
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens(begin)) / seconds if seconds else 0.0,
            "training_seconds": seconds,
            "startup_seconds": progress.startup_seconds,
            "bubble": averages.bubble.value,
            "theoretical_bubble": plan.theoretical_bubble_ratio,
            "schedule": plan.schedule,
            "run_directory": str(directory.path),
            "weights": str(weights),
            "verdict": "not checked",
        }
        if report is not None:
            directory.write_report(report)
            summary["step_seconds"] = report.seconds.measured
            summary["predicted_step_seconds"] = report.seconds.predicted
            summary["simulated_bubble"] = report.bubble.predicted
            summary["findings"] = list(report.findings)
        if newest is not None:
            summary["resumed_after_step"] = begin
        if settings.check:
            reporter.note("comparing one step with one process …")
            checks = self._check(cluster)
            summary["verdict"] = self._verdict(checks)
            summary["checks"] = [check.to_record() for check in checks]
        directory.write_summary(summary)
        reporter.end(summary)
        return summary

    def _check_position(self, newest: Path) -> None:
        manifest = read_manifest(newest)
        check_position(newest, manifest.data_position, self._windows.position(manifest.step))

    def _resume(self, trainer: Trainer, newest: Path, directory: RunDirectory, progress: _Progress) -> None:
        """Bring the weights, the learning rate, the data and what was measured to where the checkpoint is."""
        trainer.load(newest)
        step = trainer.steps_done
        self._scheduler.load_state_dict(self._scheduler.state_dict() | {"last_epoch": step})
        # As the settings have it: the checkpoint's own may be of a run that was to be shorter.
        for group, rate in zip(self._optimizer.param_groups, self._scheduler.base_lrs, strict=True):
            group["lr"] = rate * self._lr_share(step)
        progress.done = step
        for record in directory.rewind_metrics(step):
            progress.replay(record)

    def _train(
        self,
        trainer: Trainer,
        checkpoints: JobCheckpoints,
        progress: _Progress,
        directory: RunDirectory,
        reporter: Reporter,
        started_at: float,
    ) -> None:
        settings = self._settings
        averages = progress.averages
        batches = checkpoints.saving(
            trainer, self._windows.from_step(progress.done), progress.done, self._windows.position
        )
        while progress.done < settings.steps:
            interval = min(
                settings.evaluate_every - progress.done % settings.evaluate_every, settings.steps - progress.done
            )
            began = time.monotonic()
            for result in trainer.run(batches, steps=interval, scheduler=self._scheduler, progress=False):
                progress.startup_seconds = progress.startup_seconds or time.monotonic() - started_at
                averages.add(result)
                record = StepRecord(
                    result=result,
                    tokens_per_second=result.samples_per_second * settings.context,
                    learning_rate=settings.lr * self._lr_share(result.step - 1),
                )
                directory.append_metrics(record.to_json())
                reporter.step(record)
            averages.training_seconds += time.monotonic() - began
            progress.done += interval
            self._validate(trainer, progress, directory, reporter)
        if progress.validated != progress.done:  # killed between the last step and its validation
            self._validate(trainer, progress, directory, reporter)

    def _validate(self, trainer: Trainer, progress: _Progress, directory: RunDirectory, reporter: Reporter) -> None:
        validation = Validation(
            step=progress.done,
            training_loss=progress.averages.close_interval(),
            validation_loss=trainer.evaluate(self._validation),
        )
        progress.validated, progress.validation_loss = validation.step, validation.validation_loss
        directory.append_metrics(validation.to_json())
        reporter.validation(validation)

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

    def _verdict(self, checks: Sequence[Verification]) -> str:
        if not all(check.equal for check in checks):
            return "different"
        codecs = {"activations": self._settings.activation_compression, "gradients": self._plan.compression}
        lossy = [f"the codec of {what} ({codec})" for what, codec in codecs.items() if codec != "none"]
        exchange = parse_exchange(self._plan.exchange)
        if exchange.is_local:
            lossy.append("local steps")
        elif exchange.staleness:
            lossy.append(f"a staleness of {exchange.staleness}")
        return f"equal but for {' and '.join(lossy)}" if lossy else "equal"

    def _exact_exchange(self) -> dict[str, Any]:
        """Return what of the plan is to be another, so that replicas agree in every step."""
        if parse_exchange(self._plan.exchange).is_local:
            return {"exchange": "ring", "every": None}
        return {
            "exchange": str(dataclasses.replace(parse_exchange(self._plan.exchange), staleness=0)),
            "staleness": None,
        }

    def _check(self, cluster: Cluster) -> list[Verification]:
        """Compare one step in the run's own precision, and one in float64, which also judges the updated weights.

        Without codecs and local steps: nothing equals what loses precision on its way, or what is put off.
        """
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
                    plan=dataclasses.replace(
                        self._plan, activation_compression="none", compression="none", **self._exact_exchange()
                    ),
                    max_grad_norm=settings.max_grad_norm,
                    precision=settings.precision if data_type is torch.float32 else None,
                )
            )
        return checks
