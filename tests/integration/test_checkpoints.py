"""Checkpoints of real runs: what goes on from one is what would have been, and nothing that is not whole is loaded."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_subject import adamw, flip, lengthen, make_batches, make_model, make_trainer, pickled, truncate
from torch import nn

import gradwire
from gradwire_protocol.checkpoint.reader import check
from gradwire_protocol.errors import CheckpointError, SettingsError
from gradwire_protocol.v1 import coordinator_pb2

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.fixture(scope="module")
def cluster(four_processes: gradwire.LocalCluster) -> gradwire.LocalCluster:
    return four_processes


def test_a_resumed_run_is_the_one_that_was_not_interrupted(cluster: gradwire.LocalCluster, tmp_path: Path) -> None:
    batches = make_batches(12)
    model = make_model()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    losses, saving = [], None
    with make_trainer(cluster, model, optimizer) as trainer:
        for result in trainer.run(batches, scheduler=scheduler):
            losses.append(result.loss)
            if result.step == 4:
                # Behind the steps in flight; the scheduler is where these left it.
                saving = trainer.save(tmp_path / "a", data_position={"scheduler": scheduler.state_dict()}, wait=False)
        expected = trainer.state_dict()
    assert saving is not None
    assert saving.wait()
    assert saving.step == 5
    for stages in (2, 3):
        model = make_model(seed=9)
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        with make_trainer(cluster, model, optimizer, stages=stages) as trainer:
            position = trainer.load(tmp_path / "a")
            assert position is not None
            scheduler.load_state_dict(position["scheduler"])
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.8**5)
            assert optimizer.param_groups[1]["weight_decay"] == 0.0
            results = list(trainer.run(batches[5:], scheduler=scheduler))
            state = trainer.state_dict()
        assert [result.step for result in results] == list(range(6, 13))
        assert [result.loss for result in results] == pytest.approx(losses[5:], rel=0 if stages == 2 else 1e-10)
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            tolerance = 0.0 if stages == 2 else 1e-10
            torch.testing.assert_close(state[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_trainer_goes_back_and_forth_between_checkpoints(cluster: gradwire.LocalCluster, tmp_path: Path) -> None:
    batches = make_batches(6)
    with make_trainer(cluster, make_model()) as trainer:
        trainer.save(tmp_path / "begin")
        losses = [result.loss for result in trainer.run(batches)]
        trainer.save(tmp_path / "end")
        assert trainer.load(tmp_path / "begin") is None
        assert [result.loss for result in trainer.run(batches)] == losses
        trainer.save(tmp_path / "again")
        assert check(tmp_path / "again").files == check(tmp_path / "end").files
        trainer.load(tmp_path / "end")
        assert trainer.step(*batches[0]).step == 7


def blocks(document: Path, heading: str) -> list[str]:
    """The code blocks below a heading of a document."""
    text = document.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_plain_torch_goes_on_as_documented(
    cluster: gradwire.LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = make_batches(6)
    with make_trainer(cluster, make_model(dropout=0.0), max_grad_norm=None) as trainer:
        list(trainer.run(batches[:3]))
        trainer.save(tmp_path / "checkpoints" / "a")
        expected = [result.loss for result in trainer.run(batches[3:])]
        state = trainer.state_dict()
    model = make_model(seed=9, dropout=0.0)
    optimizer = adamw(model)
    monkeypatch.chdir(tmp_path)
    weights, rest = blocks(DOCUMENT, "Without Gradwire")
    assert len(weights.strip().splitlines()) <= 10
    names = {"model": model, "optimizer": optimizer}
    exec(weights, names)  # the document's own code
    exec(rest, names)
    losses = []
    for x, y in batches[3:]:
        optimizer.zero_grad()
        total = 0.0
        for x_part, y_part in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
            part = F.cross_entropy(model(x_part), y_part) / 2
            part.backward()
            total += part.item()
        optimizer.step()
        losses.append(total)
    assert losses == pytest.approx(expected, rel=1e-10)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def trainer(cluster: gradwire.LocalCluster) -> Iterator[gradwire.Trainer]:
    with make_trainer(cluster, make_model(), stages=1) as trainer:
        list(trainer.run(make_batches(2)))
        yield trainer


@pytest.fixture(scope="module")
def good(trainer: gradwire.Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "a"
    trainer.save(path)
    return path


@pytest.mark.parametrize("damage", [truncate, flip, lengthen, pickled, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_a_file_that_is_not_whole_is_named_and_refused(
    trainer: gradwire.Trainer, good: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    damage(bad / file)
    with pytest.raises(CheckpointError, match=re.escape(str(bad / file))) as caught:
        trainer.load(bad)
    if damage is pickled and file != "manifest.json":
        assert "looks like a pickle" in str(caught.value)
    # Neither the run nor the good one has suffered.
    trainer.load(good)


@pytest.mark.parametrize("name", ["weights.pt", "extra.pkl", "innocent.txt", "archive"])
def test_a_planted_pickle_is_refused(trainer: gradwire.Trainer, good: Path, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    if name == "archive":
        torch.save({"weights": torch.ones(2)}, bad / name)
    else:
        (bad / name).write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=f"{name} is refused.*pickle"):
        trainer.load(bad)


def test_a_pickle_with_a_manifest_that_vouches_for_it_is_refused(
    trainer: gradwire.Trainer, good: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    pickled(bad / "model.safetensors")
    from gradwire_protocol.checkpoint.files import record_of

    manifest = check(good)
    files = manifest.files | {"model.safetensors": record_of(bad / "model.safetensors")}
    (bad / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_text())
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be used: .*not a safetensors file.*pickle"):
        trainer.load(bad)
    files = {"../good/model.safetensors": manifest.files["model.safetensors"]}
    (bad / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_text())
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be used: files: .*not a file of a checkpoint"):
        trainer.load(bad)


def test_what_does_not_fit_is_refused(cluster: gradwire.LocalCluster, good: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="no checkpoint at"),
        make_trainer(cluster, make_model(), stages=1) as other,
    ):
        other.load(tmp_path / "nothing")

    def refused(match: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **changes: Any) -> None:
        with make_trainer(cluster, model, optimizer, stages=1, **changes) as other:
            with pytest.raises(CheckpointError, match=match):
                other.load(good)
            other.step(*make_batches(1)[0])

    model = make_model()
    refused("another seed", model, seed=4)
    refused("another optimizer", model, torch.optim.SGD(model.parameters(), lr=0.1))
    refused("other parameter groups", model, torch.optim.AdamW(model.parameters()))
    refused(r"another model.*different: embedding.weight: \[12, 8\]", make_model(width=8))
    untied = make_model()
    untied.head.weight = nn.Parameter(torch.zeros(12, 16, dtype=torch.float64))
    refused(r"missing: head.weight \(tied to embedding.weight there\)", untied)
    refused("float64 there", make_model().float())


def test_what_cannot_be_saved(trainer: gradwire.Trainer, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="JSON"):
        trainer.save(tmp_path / "a", data_position={"loader": object()})
    with pytest.raises(SettingsError, match="come back"):
        trainer.save(tmp_path / "a", data_position={"shape": (1, 2)})
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    with pytest.raises(CheckpointError, match="not written over"):
        trainer.save(tmp_path / "precious")
    assert trainer.step(*make_batches(1)[0]).loss > 0


def test_training_goes_on_after_a_write_that_failed(trainer: gradwire.Trainer, good: Path, tmp_path: Path) -> None:
    trainer.load(good)
    expected = [result.loss for result in trainer.run(make_batches(3))]
    trainer.load(good)
    (tmp_path / "file").write_text("")
    impossible = tmp_path / "file" / "a"
    with pytest.raises(CheckpointError, match="could not be written"):
        trainer.save(impossible)
    saving = trainer.save(impossible, wait=False)
    with pytest.raises(CheckpointError, match="could not be written"):
        saving.wait()
    saving = trainer.save(impossible, wait=False)
    saving.settle()
    with pytest.warns(gradwire.CheckpointWarning, match=r"could not be written.*Training goes on"):
        first = trainer.step(*make_batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        losses = [first.loss, *(result.loss for result in trainer.run(make_batches(3)[1:]))]
    assert losses == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(trainer: gradwire.Trainer, small_disk: Path) -> None:
    trainer.save(small_disk / "a")
    before = check(small_disk / "a")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(max(0, free - 20_000)))
    trainer.step(*make_batches(1)[0])
    for path in (small_disk / "a", small_disk / "b"):
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left on device"):
            trainer.save(path)
    assert check(small_disk / "a") == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["a", "filler"]
    trainer.step(*make_batches(1)[0])
    (small_disk / "filler").unlink()
    trainer.save(small_disk / "a")
    assert check(small_disk / "a").step == before.step + 2


_WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
import gradwire
from test_checkpoints import make_batches, make_model, make_trainer
with gradwire.connect(sys.argv[1]) as cluster, make_trainer(cluster, make_model(width=256)) as trainer:
    while True:
        trainer.step(*make_batches(1)[0])
        trainer.save(sys.argv[2])
        print("saved", flush=True)
"""


@pytest.mark.fault
def test_killed_while_it_writes_the_last_checkpoint_loads(cluster: gradwire.LocalCluster, tmp_path: Path) -> None:
    path = tmp_path / "a"
    generator = random.Random(5)

    def active() -> set[str]:
        return {run.run for run in cluster.status().runs if run.state == coordinator_pb2.RUN_STATE_ACTIVE}

    others = active()
    for _ in range(2):
        arguments = [sys.executable, "-c", _WRITER, cluster.address, str(path), str(Path(__file__).parent)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "saved\n"
            for _ in range(generator.randrange(5)):
                writer.stdout.readline()
            time.sleep(generator.random() * 0.05)
            writer.send_signal(signal.SIGKILL)
        assert check(path).step >= 1
        while active() != others:  # its servers are not free yet
            time.sleep(0.02)
    with make_trainer(cluster, make_model(seed=9, width=256), stages=3) as other:
        other.load(path)
        other.step(*make_batches(1)[0])
        other.save(path)
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_leaving_a_trainer_finishes_what_is_being_written(cluster: gradwire.LocalCluster, tmp_path: Path) -> None:
    with make_trainer(cluster, make_model()) as trainer:
        trainer.step(*make_batches(1)[0])
        saving = trainer.save(tmp_path / "a", wait=False)
    assert saving.done
    assert check(tmp_path / "a").step == 1
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("write ")]
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["seed"] == 3
