from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradwire.job.run_directory import RunDirectory
from gradwire.run_plan import RunPlan
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.v1 import coordinator_pb2


def test_weights_come_back_under_all_names(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    weight = torch.randn(3, 2)
    state = {"embedding.weight": weight, "norm.bias": torch.ones(2), "head.weight": weight}
    path = directory.write_weights(state)
    assert path.stat().st_size < 3 * weight.numel() * 4 + 1000
    restored = directory.read_weights()
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    directory.write_settings({"layers": 2, "lr": 0.5, "check": True, "out": None})
    assert directory.read_settings() == {"layers": 2, "lr": 0.5, "check": True}
    directory.append_metrics({"step": 1})
    directory.append_metrics({"step": 2})
    assert [json.loads(line) for line in directory.metrics.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
    stage = coordinator_pb2.StageSummary(stage=0, parameters=7)
    directory.write_plan(RunPlan.from_proto(coordinator_pb2.PlanSummary(schedule="1f1b", stages=[stage])))
    plan = json.loads((directory.path / "plan.json").read_text())
    assert plan["schedule"] == "1f1b"
    assert plan["extra_warm_up"] == 0


def test_metrics_go_back_to_a_step(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    assert directory.rewind_metrics(3) == []
    for step in range(1, 6):
        directory.append_metrics({"step": step})
    with directory.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # killed
    kept = [{"step": 1}, {"step": 2}, {"step": 3}]
    assert directory.rewind_metrics(3) == kept
    assert [json.loads(line) for line in directory.metrics.read_text().splitlines()] == kept


def test_only_a_runs_directory_is_reopened(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not the directory of a run"):
        RunDirectory.reopen(tmp_path)
    RunDirectory(tmp_path).write_settings({"layers": 2})
    assert RunDirectory.reopen(tmp_path).settings.read_text() == "layers = 2\n"


def test_a_directory_with_contents_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(SettingsError, match="not empty"):
        RunDirectory.create(tmp_path)
    with pytest.raises(SettingsError, match="cannot be made"):
        RunDirectory.create(tmp_path / "precious")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not the directory of a finished run"):
        RunDirectory.find(tmp_path)
