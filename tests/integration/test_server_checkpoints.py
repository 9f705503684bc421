"""Checkpoints that stage servers write and read: the same format, on any layout, and no write holds training up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from checkpoint_subject import adamw, asgd, make_batches, make_model, make_trainer, sgd
from safetensors.torch import load_file
from torch import nn

import gradwire
from gradwire_protocol.checkpoint.reader import check
from gradwire_protocol.errors import CheckpointError


@pytest.fixture(scope="module")
def root(checkpoint_root: Path) -> Path:
    return checkpoint_root


@pytest.fixture(scope="module")
def cluster(four_processes: gradwire.LocalCluster) -> gradwire.LocalCluster:
    return four_processes


@pytest.mark.parametrize("make_optimizer", [adamw, sgd, asgd])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    cluster: gradwire.LocalCluster, root: Path, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    batches = make_batches(9)
    name = f"deep/{make_optimizer.__name__}"
    model = make_model()
    losses, saving = [], None
    with make_trainer(cluster, model, make_optimizer(model)) as trainer:
        for result in trainer.run(batches):
            losses.append(result.loss)
            if result.step == 3:
                saving = trainer.save(name, data_position={"epoch": 2}, wait=False, storage="server")
        expected = trainer.state_dict()
    assert saving is not None
    assert saving.wait()
    step = saving.step
    manifest = check(root / name)
    assert manifest.step == step
    assert "model-00001-of-00002.safetensors" in manifest.files
    for stages, storage, place in (
        (2, "server", name),
        (3, "server", name),
        (1, "server", name),
        (1, "client", root / name),
    ):
        model = make_model(seed=9)
        with make_trainer(cluster, model, make_optimizer(model), stages=stages) as trainer:
            assert trainer.load(place, storage=storage) == {"epoch": 2}
            results = list(trainer.run(batches[step:]))
            state = trainer.state_dict()
        exact = stages == 2
        assert [result.step for result in results] == list(range(step + 1, 10))
        assert [result.loss for result in results] == pytest.approx(losses[step:], rel=0 if exact else 1e-10)
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            tolerance = 0.0 if exact else 1e-10
            torch.testing.assert_close(state[key], tensor, rtol=tolerance, atol=tolerance)


def test_a_run_shows_its_last_checkpoint_while_it_goes_on(cluster: gradwire.LocalCluster) -> None:
    with make_trainer(cluster, make_model(), stages=2) as trainer:
        for step, name in enumerate(("shown/first", "shown/second"), start=1):
            list(trainer.run(make_batches(1)))
            trainer.save(name, storage="server")
            (shown,) = (run for run in cluster.status().runs if run.run == trainer.run_id)
            assert (shown.checkpoint.directory, shown.checkpoint.step) == (name, step)


def read_plainly(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in folder.glob(f"{kind}*.safetensors"):
        state |= load_file(file)
    return state


def test_the_files_are_those_that_the_client_writes(cluster: gradwire.LocalCluster, root: Path, tmp_path: Path) -> None:
    for stages in (1, 3):
        with make_trainer(cluster, make_model(), stages=stages) as trainer:
            list(trainer.run(make_batches(2)))
            trainer.save(tmp_path / str(stages), data_position={"batch": 7})
            trainer.save(f"same/{stages}", data_position={"batch": 7}, storage="server")
        by_client, by_servers = check(tmp_path / str(stages)), check(root / "same" / str(stages))
        if stages == 1:
            assert by_servers == by_client  # every hash included
        assert by_servers.model_copy(update={"files": {}}) == by_client.model_copy(update={"files": {}})
        for kind in ("model", "optimizer"):
            ours, theirs = (read_plainly(path, kind) for path in (root / f"same/{stages}", tmp_path / str(stages)))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # As Hugging Face's libraries find the tensors of several files.
    folder = root / "same" / "3"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["head.weight"] == "embedding.weight"
    assert index["weight_map"].keys() == read_plainly(folder, "model").keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(folder / file)
    state = read_plainly(folder, "model")
    state |= {name: state[other] for name, other in by_servers.tied.items()}
    make_model(seed=9).load_state_dict(state)


def test_servers_with_several_stages_save_what_they_share_once(
    cluster: gradwire.LocalCluster, root: Path, tmp_path: Path
) -> None:
    """The tied weight is on the first stage and on the last: on one server here, on two where it is loaded."""
    batches, model = make_batches(5), make_model()
    with make_trainer(cluster, model, sgd(model), stages=2, schedule="zb-v") as trainer:
        list(trainer.run(batches[:3]))
        trainer.save("virtual", storage="server")
        trainer.save(tmp_path / "virtual")
        losses = [result.loss for result in trainer.run(batches[3:])]
        expected = trainer.state_dict()
    ours, theirs = (read_plainly(path, "model") for path in (root / "virtual", tmp_path / "virtual"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    written = [name for file in (root / "virtual").glob("model*.safetensors") for name in load_file(file)]
    assert len(written) == len(set(written))
    for stages, schedule, storage in ((2, "zb-v", "server"), (3, "interleaved-1f1b", "server"), (2, "1f1b", "client")):
        model = make_model(seed=9)
        with make_trainer(cluster, model, sgd(model), stages=stages, schedule=schedule) as trainer:
            trainer.load("virtual" if storage == "server" else tmp_path / "virtual", storage=storage)
            exact = schedule == "zb-v"
            found = [result.loss for result in trainer.run(batches[3:])]
            assert found == pytest.approx(losses, rel=0 if exact else 1e-10)
            state = trainer.state_dict()
        for key, tensor in expected.items():
            tolerance = 0.0 if exact else 1e-10
            torch.testing.assert_close(state[key], tensor, rtol=tolerance, atol=tolerance)


def test_tensors_of_a_loss_are_no_part_of_it(cluster: gradwire.LocalCluster, root: Path) -> None:
    model = make_model()
    loss = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 1.5, 12, dtype=torch.float64))
    arguments: dict[str, Any] = {"loss": loss, "example": make_batches(1)[0], "seed": 3}
    batches = make_batches(4)
    with cluster.trainer(model, adamw(model), plan=gradwire.Plan(stages=2), **arguments) as trainer:
        list(trainer.run(batches[:2]))
        trainer.save("loss", storage="server")
        expected = [result.loss for result in trainer.run(batches[2:])]
        assert (
            read_plainly(root / "loss", "model").keys() | check(root / "loss").tied.keys() == model.state_dict().keys()
        )
        trainer.load("loss", storage="server")
        assert [result.loss for result in trainer.run(batches[2:])] == expected


class Large(nn.Module):
    """Steps that take milliseconds, and a state of 200 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.register_buffer("large", torch.ones(6_250_000, 8))
        self.second = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(torch.tanh(self.first(x)) * self.large[:1])
        return output


def large_trainer(cluster: gradwire.Cluster) -> gradwire.Trainer:
    torch.manual_seed(0)
    model = Large()
    return cluster.trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss=F.mse_loss,
        example=LARGE_BATCH,
        plan=gradwire.Plan(stages=2, microbatches=1),
    )


LARGE_BATCH = (torch.ones(4, 4), torch.zeros(4, 4))


def wait_until_written_to(root: Path) -> None:
    """Wait until a file of many megabytes has begun."""
    while not any(path.stat().st_size > 2**20 for path in root.rglob("*.unfinished")):
        time.sleep(0.001)


def test_steps_go_on_while_files_are_written(cluster: gradwire.LocalCluster, root: Path) -> None:
    with large_trainer(cluster) as trainer:
        for _ in range(3):
            trainer.step(*LARGE_BATCH)
        saving = trainer.save("large", wait=False, storage="server")
        steps = 0
        while not saving.done:
            trainer.step(*LARGE_BATCH)
            steps += bool(not saving.done)
        saving.wait()
        assert steps >= 5
        assert check(root / "large").step == saving.step == 3
        assert trainer.step(*LARGE_BATCH).step >= 3 + steps
    shutil.rmtree(root / "large")


@pytest.fixture(scope="module")
def fragile(root: Path) -> Iterator[gradwire.LocalCluster]:
    """For the two tests that kill of it, one after the other: first a stage server, then the coordinator."""
    folder = root / "fragile"
    folder.mkdir()
    with gradwire.local(stage_servers=3, checkpoint_root=folder) as cluster:
        yield cluster


@pytest.mark.fault
def test_a_server_killed_while_it_writes_leaves_the_last_checkpoint(fragile: gradwire.LocalCluster, root: Path) -> None:
    folder = root / "fragile"
    with large_trainer(fragile) as trainer:
        trainer.step(*LARGE_BATCH)
        trainer.save("a", storage="server")
    before = check(folder / "a")
    trainer = large_trainer(fragile)
    trainer.load("a", storage="server")
    trainer.step(*LARGE_BATCH)
    saving = trainer.save("a", wait=False, storage="server")
    wait_until_written_to(folder)
    os.kill(next(pid for pid in fragile.process_ids[1:] if writes_below(pid, folder)), signal.SIGKILL)
    with pytest.raises(gradwire.StageFailed):
        saving.wait()
    with pytest.raises(gradwire.StageFailed):
        trainer.step(*LARGE_BATCH)
    trainer.close()
    assert check(folder / "a") == before
    with large_trainer(fragile) as other:
        other.load("a", storage="server")
        assert other.step(*LARGE_BATCH).step == 2
        other.save("a", storage="server")
    assert check(folder / "a").step == 2
    assert [path.name for path in folder.iterdir()] == ["a"]
    shutil.rmtree(folder / "a")


def test_what_a_killed_coordinator_leaves_goes_with_the_next_save(
    cluster: gradwire.LocalCluster, fragile: gradwire.LocalCluster, root: Path
) -> None:
    folder = root / "fragile"
    trainer = large_trainer(fragile)
    saving = trainer.save("a", wait=False, storage="server")
    wait_until_written_to(folder)
    os.kill(fragile.process_ids[0], signal.SIGKILL)
    with pytest.raises(gradwire.GradwireError):
        saving.wait()
    trainer.close()
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    with large_trainer(cluster) as trainer:
        trainer.save("fragile/a", storage="server")
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert check(folder / "a").step == 0
    shutil.rmtree(folder / "a")


def writes_below(pid: int, folder: Path) -> bool:
    return any(Path(file.path).is_relative_to(folder) for file in psutil.Process(pid).open_files())


@pytest.fixture(scope="module")
def trainer(cluster: gradwire.LocalCluster) -> Iterator[gradwire.Trainer]:
    with make_trainer(cluster, make_model()) as trainer:
        list(trainer.run(make_batches(2)))
        yield trainer


@pytest.fixture
def small_disk(root: Path) -> Iterator[Path]:
    disk = root / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(trainer: gradwire.Trainer, small_disk: Path) -> None:
    trainer.save("disk/a", storage="server")
    before = check(small_disk / "a")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(max(0, free - 12_000)))
    trainer.step(*make_batches(1)[0])
    for name in ("disk/a", "disk/b"):
        with pytest.raises(
            CheckpointError, match=r"could not be written by stage \d \(server .*No space left on device"
        ):
            trainer.save(name, storage="server")
    assert check(small_disk / "a") == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["a", "filler"]
    saving = trainer.save("disk/a", wait=False, storage="server")
    saving.settle()
    with pytest.warns(gradwire.CheckpointWarning, match=r"No space left.*Training goes on"):
        trainer.step(*make_batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        trainer.step(*make_batches(1)[0])
    (small_disk / "filler").unlink()
    trainer.save("disk/a", storage="server")
    assert check(small_disk / "a").step == before.step + 3


def test_leaving_a_trainer_finishes_what_is_being_written(cluster: gradwire.LocalCluster, root: Path) -> None:
    with make_trainer(cluster, make_model()) as trainer:
        trainer.step(*make_batches(1)[0])
        saving = trainer.save("left", wait=False, storage="server")
    assert saving.done
    assert check(root / "left").step == 1
    # A client that closes its stream without waiting: the coordinator does.
    with make_trainer(cluster, make_model()) as trainer:
        trainer.save("drained", wait=False, storage="server")
        trainer._session._drive.close(30)
        assert check(root / "drained").step == 0


def test_checkpoints_go_back_and_forth(cluster: gradwire.LocalCluster, root: Path) -> None:
    batches = make_batches(4)
    with make_trainer(cluster, make_model()) as trainer:
        trainer.save("begin", storage="server")
        losses = [result.loss for result in trainer.run(batches)]
        savings = [trainer.save(f"end/{index}", wait=False, storage="server") for index in range(3)]
        trainer.load("begin", storage="server")
        assert all(saving.wait() for saving in savings)
        assert [result.loss for result in trainer.run(batches)] == losses
        trainer.save("again", storage="server")
    assert check(root / "again").files == check(root / "end/0").files == check(root / "end/2").files
