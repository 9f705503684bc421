"""`gradwire train --resume`: a job that is killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_command_line import TINY, Commands

import gradwire

# The 30 steps are most of an epoch and a half.
SETTINGS = TINY | {"steps": 30, "evaluate-every": 7, "save-every": 4, "batch": 16, "warmup-steps": 3}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("jobs"))
    (commands.directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def whole(commands: Commands, four_processes: gradwire.LocalCluster) -> Path:
    """A run that nothing interrupted, on a cluster that its resumptions go on with."""
    flags = [*FLAGS, "--coordinator", four_processes.address]
    code, _, err = commands.run("train", "--json", "--no-check", "--data", "text.txt", "--out", "whole", *flags)
    assert code == 0, err
    return commands.directory / "whole"


def losses(run: Path) -> list[tuple[int, Any, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in records]


def assert_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    weights, expected = load_file(run / "weights.safetensors"), load_file(whole / "weights.safetensors")
    assert weights.keys() == expected.keys()
    assert all((weights[name] == tensor).all() for name, tensor in expected.items())
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, whole)]
    assert summaries[0]["epochs"] == summaries[1]["epochs"]
    assert summaries[0]["validation_loss"] == summaries[1]["validation_loss"]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.fault
def test_a_killed_job_goes_on_exactly(commands: Commands, whole: Path) -> None:
    assert checkpoints(whole) == ["step-24", "step-28", "step-30"]
    process = commands.start("train", "--json", "--no-check", "--data", "text.txt", "--out", "killed", *FLAGS)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["step"] == 17:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # More than the ten seconds that a process gives itself to end.
    commands.assert_none_left(15)
    run = commands.directory / "killed"
    code, out, err = commands.run("train", "--resume", "killed", "--json")
    assert code == 0, err
    *steps, summary = map(json.loads, out.splitlines())
    begin = summary["resumed_after_step"]
    assert begin in (12, 16, 20, 24, 28)
    assert [step["step"] for step in steps] == list(range(begin + 1, 31))
    assert_same(run, whole)


def test_the_newest_whole_checkpoint_is_taken_on_another_layout(commands: Commands, whole: Path) -> None:
    run = commands.directory / "damaged"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-30")
    (run / "checkpoints" / "step-28" / "model.safetensors").write_bytes(b"\0" * 100)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 31, "lo')
    code, out, err = commands.run("train", "--resume", "damaged", "--stages", "1")
    assert code == 0, err
    assert "step-28/model.safetensors cannot be used: it is truncated" in out
    assert "going on after step 24" in out
    final = [run_losses[-1] for run_losses in (losses(run), losses(whole))]
    assert final[0][2] == pytest.approx(final[1][2], rel=1e-4)
    assert checkpoints(run) == ["step-24", "step-28", "step-30"]


def test_a_finished_run_can_be_made_longer(commands: Commands, whole: Path) -> None:
    run = commands.directory / "longer"
    shutil.copytree(whole, run)
    code, out, err = commands.run("train", "--resume", "longer", "--steps", "33", "--json")
    assert code == 0, err
    *steps, summary = map(json.loads, out.splitlines())
    assert [step["step"] for step in steps] == [31, 32, 33]
    assert summary["steps"] == 33
    assert checkpoints(run) == ["step-30", "step-32", "step-33"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "nowhere"], "not the directory of a run"),
        (["--resume", "whole", "--out", "other"], "exclude each other"),
        (["--resume", "whole", "--config", "whole/settings.toml"], "exclude each other"),
        (["--resume", "without"], "no checkpoints"),
    ],
)
def test_what_cannot_be_resumed(commands: Commands, whole: Path, flags: list[str], message: str) -> None:
    (commands.directory / "without").mkdir(exist_ok=True)
    shutil.copy(whole / "settings.toml", commands.directory / "without")
    code, _, err = commands.run("train", *flags)
    assert code == 2
    assert message in err


def test_other_data_is_refused(commands: Commands, whole: Path) -> None:
    shutil.copytree(whole, commands.directory / "other")
    code, _, err = commands.run("train", "--resume", "other", "--steps", "40", "--batch", "8")
    assert code == 2
    assert "its batches would be others" in err
    assert "batch 16" in err
