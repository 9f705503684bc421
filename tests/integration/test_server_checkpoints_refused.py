"""What stage servers refuse to write or to read as a checkpoint; the run and what is on disk do not suffer."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from checkpoint_subject import flip, make_batches, make_model, make_trainer, pickled, truncate

import gradwire
from gradwire_protocol.errors import CheckpointError, FrameError, SettingsError, from_rpc_error
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc, run_pb2


@pytest.fixture(scope="module")
def root(checkpoint_root: Path) -> Path:
    return checkpoint_root


@pytest.fixture(scope="module")
def cluster(four_processes: gradwire.LocalCluster) -> gradwire.LocalCluster:
    return four_processes


@pytest.fixture(scope="module")
def trainer(cluster: gradwire.LocalCluster) -> Iterator[gradwire.Trainer]:
    with make_trainer(cluster, make_model()) as trainer:
        list(trainer.run(make_batches(2)))
        yield trainer


@pytest.fixture(scope="module")
def good(trainer: gradwire.Trainer, root: Path) -> Path:
    trainer.save("good/a", storage="server")
    return root / "good" / "a"


FILES = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "optimizer-00001-of-00002.safetensors",
    "optimizer-00002-of-00002.safetensors",
    "manifest.json",
)


@pytest.mark.parametrize("damage", [truncate, flip, pickled, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_whole_is_named_and_refused(
    trainer: gradwire.Trainer, good: Path, root: Path, file: str, damage: Callable[[Path], None]
) -> None:
    bad = root / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    damage(bad / file)
    with pytest.raises(CheckpointError, match=re.escape(str(bad / file))):
        trainer.load("bad", storage="server")
    # Neither the run nor the good one has suffered.
    trainer.load("good/a", storage="server")


@pytest.mark.parametrize("name", ["weights.pt", "innocent.txt"])
def test_a_planted_pickle_is_refused(trainer: gradwire.Trainer, good: Path, root: Path, name: str) -> None:
    bad = root / "planted"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    (bad / name).write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=f"{name} is refused.*pickle"):
        trainer.load("planted", storage="server")


def test_what_does_not_fit_is_refused_before_anything_changes(
    cluster: gradwire.LocalCluster, trainer: gradwire.Trainer, good: Path
) -> None:
    with make_trainer(cluster, make_model(width=8), stages=1) as other:
        before = other.state_dict()
        with pytest.raises(CheckpointError, match=r"another model.*embedding.weight: \[12, 8\]"):
            other.load("good/a", storage="server")
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            other.load("good/b", storage="server")
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
        other.step(*make_batches(1)[0])
    with make_trainer(cluster, make_model(), seed=4, stages=1) as other:
        with pytest.raises(CheckpointError, match="another seed"):
            other.load("good/a", storage="server")
        other.step(*make_batches(1)[0])


@pytest.mark.parametrize("path", ["", ".", "..", "../a", "good/../../a", "/tmp/a"])
def test_paths_out_of_the_root_are_refused(
    trainer: gradwire.Trainer, cluster: gradwire.LocalCluster, path: str
) -> None:
    with pytest.raises(SettingsError):
        trainer.save(path, storage="server")
    with pytest.raises(SettingsError):
        trainer.load(path, storage="server")
    stub = coordinator_pb2_grpc.CoordinatorServiceStub(cluster.channel)
    requests = {
        "BeginSave": coordinator_pb2.BeginSaveRequest(run=trainer.run_id, directory=path, manifest=MANIFEST),
        "InspectCheckpoint": coordinator_pb2.InspectCheckpointRequest(directory=path),
    }
    for method, request in requests.items():
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, method)(request)
        assert isinstance(from_rpc_error(caught.value), SettingsError)
    assert trainer.step(*make_batches(1)[0]).loss > 0


MANIFEST = json.dumps({"versions": {}, "step": 2, "seed": 3, "optimizer": {"name": "AdamW", "groups": []}, "files": {}})


def test_links_out_of_the_root_are_refused(trainer: gradwire.Trainer, good: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "a")
    (root / "link").symlink_to(tmp_path)
    for call in (trainer.save, trainer.load):
        with pytest.raises(SettingsError, match="leads out of its root directory through a link"):
            call("link/a", storage="server")  # type: ignore[operator]
    linked = root / "linked"
    shutil.copytree(good, linked)
    (linked / FILES[0]).unlink()
    (linked / FILES[0]).symlink_to(tmp_path / "a" / FILES[0])
    with pytest.raises(SettingsError, match="leads out of its root directory through a link"):
        trainer.load("linked", storage="server")
    assert trainer.step(*make_batches(1)[0]).loss > 0


def test_a_save_that_was_not_announced_ends_its_run_only(cluster: gradwire.LocalCluster, root: Path) -> None:
    with make_trainer(cluster, make_model(), stages=1) as trainer:
        session = trainer._session
        save = run_pb2.SaveState(directory="../a", token="t")
        future, outcome = session.submit_save(run_pb2.Entry(number=session.reserve(), save_state=save))
        for waited in (future, outcome):
            with pytest.raises(SettingsError, match="not a relative path"):
                waited.result(10)
    with make_trainer(cluster, make_model(), stages=1) as trainer:
        session = trainer._session
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(cluster.channel)
        request = coordinator_pb2.BeginSaveRequest(run=trainer.run_id, directory="announced", manifest=MANIFEST)
        token = stub.BeginSave(request).token
        save = run_pb2.SaveState(directory="other", token=token)
        future, _ = session.submit_save(run_pb2.Entry(number=session.reserve(), save_state=save))
        with pytest.raises(FrameError, match="was not announced"):
            future.result(10)
    assert not list(root.glob(".*"))


def test_what_cannot_be_saved(trainer: gradwire.Trainer, root: Path) -> None:
    (root / "precious").mkdir()
    (root / "precious" / "file").write_text("")
    with pytest.raises(CheckpointError, match="not written over"):
        trainer.save("precious", storage="server")
    with pytest.raises(CheckpointError, match=r"file/a could not be written by the coordinator.*File exists"):
        trainer.save("precious/file/a", storage="server")
    with pytest.raises(SettingsError, match="storage is not valid"):
        trainer.save("a", storage="disk")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="JSON"):
        trainer.save("a", data_position={"loader": object()}, storage="server")
    assert trainer.step(*make_batches(1)[0]).loss > 0
    assert not list(root.glob(".*"))
