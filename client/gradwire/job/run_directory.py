"""The directory that a job leaves behind: settings, plan, metrics, weights, logs; `gradwire sample` reads it."""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwire.job.settings import write_toml
from gradwire.run_plan import RunPlan
from gradwire_protocol.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from gradwire.report import Report

_SETTINGS, _PLAN, _METRICS, _WEIGHTS, _SUMMARY = (
    "settings.toml",
    "plan.json",
    "metrics.jsonl",
    "weights.safetensors",
    "summary.json",
)
_CHECKPOINT = re.compile(r"step-(\d{1,15})")
_REPORT, _REPORT_TEXT = "report.json", "report.txt"


def checkpoint_steps(directory: Path) -> dict[Path, int]:
    """Return the checkpoints in a directory that are there under their final names, and their steps."""
    if not directory.is_dir():
        return {}
    return {path: int(match[1]) for path in directory.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}


class RunDirectory:
    """A run directory, made or found; its parts are written as the run goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path | None) -> RunDirectory:
        """Make a new directory; None: runs/<time>. SettingsError if it holds something already."""
        path = path if path is not None else Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
        except OSError as error:
            raise SettingsError("The run directory cannot be made", expected=str(path), got=str(error)) from error
        if occupied:
            raise SettingsError(
                "The run directory is not empty",
                expected="a new or empty directory",
                got=str(path),
                remedy="give another --out, or remove it",
            )
        return cls(path)

    @classmethod
    def find(cls, path: Path) -> RunDirectory:
        """Take a finished run's directory. SettingsError if it is none."""
        missing = [name for name in (_SETTINGS, _WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise SettingsError(
                f"{path} is not the directory of a finished run",
                expected="a directory that `gradwire train` made",
                got=f"no {' and no '.join(missing)} in it",
            )
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """Take the directory of a run that shall go on. SettingsError if it is none."""
        if not (path / _SETTINGS).is_file():
            raise SettingsError(
                f"{path} is not the directory of a run",
                expected="a directory that `gradwire train` made",
                got=f"no {_SETTINGS} in it",
            )
        return cls(path)

    @property
    def settings(self) -> Path:
        """The settings that the run was made with."""
        return self.path / _SETTINGS

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are, each in a directory step-N."""
        return self.path / "checkpoints"

    @property
    def last_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return max(checkpoint_steps(self.checkpoints).values(), default=None)

    @property
    def logs(self) -> Path:
        """Where the local cluster's processes write."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: for each step, and for each validation."""
        return self.path / _METRICS

    def write_settings(self, values: Mapping[str, Any]) -> None:
        (self.path / _SETTINGS).write_text(write_toml(values))

    def read_settings(self) -> dict[str, Any]:
        return tomllib.loads((self.path / _SETTINGS).read_text())

    def write_plan(self, plan: RunPlan) -> None:
        (self.path / _PLAN).write_text(json.dumps(plan.to_record(), indent=2) + "\n")

    def write_report(self, report: Report) -> None:
        """Write what was predicted beside what was measured, as JSON and as people read it."""
        (self.path / _REPORT).write_text(json.dumps(report.to_record(), indent=2) + "\n")
        (self.path / _REPORT_TEXT).write_text(f"{report}\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop the records of later steps, which a run that goes on from this one writes anew; return the rest."""
        try:
            lines = self.metrics.read_text().splitlines()
        except FileNotFoundError:
            return []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the last one, of a process that was killed
                break
            if record["step"] <= step:
                kept.append(record)
        unfinished = self.path / f"{_METRICS}.unfinished"
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept))
        unfinished.replace(self.metrics)
        return kept

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        (self.path / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")

    def write_weights(self, state: Mapping[str, torch.Tensor]) -> Path:
        """Write a state dict; a tensor with several names is stored once, and the metadata name the others."""
        from safetensors.torch import save_file  # imports torch, which reading settings does not need

        first: dict[int, str] = {}
        ties = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
        stored = {name: state[name].contiguous() for name, other in ties.items() if name == other}
        metadata = {name: other for name, other in ties.items() if name != other}
        path = self.path / _WEIGHTS
        save_file(stored, str(path), metadata={"format": "pt", **metadata})
        return path

    def read_weights(self) -> dict[str, torch.Tensor]:
        """Return the state dict, under all its names."""
        from safetensors import safe_open  # imports torch, which reading settings does not need

        with safe_open(str(self.path / _WEIGHTS), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            ties = {name: other for name, other in (file.metadata() or {}).items() if other in state}
        return state | {name: state[other] for name, other in ties.items()}
