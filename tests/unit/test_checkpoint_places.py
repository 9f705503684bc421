"""Which paths a checkpoint may be written to and read from, and what is well-formed in entries about it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradwire_protocol.checkpoint.directory import partial_path, replaced
from gradwire_protocol.checkpoint.files import FileRecord, RawTensor, name_files, write_safetensors, write_text
from gradwire_protocol.checkpoint.manifest import FILE_NAME, Manifest, SavedOptimizer, parse_draft
from gradwire_protocol.checkpoint.reader import StoredCheckpoint
from gradwire_protocol.checkpoint.requests import check_save, check_stored
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.errors import CheckpointError, FrameError, GradwireError, SettingsError
from gradwire_protocol.torch_tensors import raw_from
from gradwire_protocol.v1 import run_pb2

DRAFT = Manifest(versions={"gradwire": "1"}, step=2, seed=0, optimizer=SavedOptimizer(name="SGD", groups=()))
OUTSIDE = ("", ".", "..", "../a", "a/../../b", "/a", "a//b", "a/", "./a", "a\\b", "a\nb", "a" * 2000)


def write_checkpoint(path: Path, value: float = 1.0) -> None:
    with replaced(path) as directory:
        tensors: list[RawTensor] = [raw_from("weight", torch.full((4,), value))]
        record = write_safetensors(directory / "one", tensors, {})
        files = name_files(directory, "model", [("one", record)], {})
        files |= name_files(directory, "optimizer", [], {})
        write_text(directory / FILE_NAME, DRAFT.completed(files, {"weight": {"step": 2}}).to_text())


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_out_of_the_root_are_refused(tmp_path: Path, name: str) -> None:
    root = CheckpointRoot(tmp_path, "The service")
    for find in (root.target, root.stored, lambda path: root.partial(path, "t")):
        with pytest.raises(SettingsError):
            find(name)
    with pytest.raises(SettingsError):
        check_save(run_pb2.SaveState(directory=name, token="t"))
    with pytest.raises(SettingsError):
        check_stored(run_pb2.StoredState(directory=name, manifest_sha256="0" * 64))
    assert list(tmp_path.iterdir()) == []


def test_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "root", tmp_path / "outside"
    inside.mkdir()
    write_checkpoint(outside / "a")
    root = CheckpointRoot(inside, "The service")
    (inside / "link").symlink_to(outside)
    (inside / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("link/b", "link/deep/b", "gone/b"):
        with pytest.raises(SettingsError, match=r"through a link|is not there"):
            root.target(name)
    with pytest.raises(CheckpointError, match="not written over"):
        root.target("link")
    with pytest.raises(SettingsError, match="through a link"):
        root.stored("link/a")
    partial_path(outside / "a", "t").mkdir()
    with pytest.raises(SettingsError, match="through a link"):
        root.partial("link/a", "t")
    for name in ("model.safetensors", FILE_NAME):
        path = inside / name
        shutil.copytree(outside / "a", path)
        (path / name).unlink()
        (path / name).symlink_to(outside / "a" / name)
        with pytest.raises(SettingsError, match="through a link"):
            StoredCheckpoint(root.stored(name), root=inside)
        StoredCheckpoint(path)  # without a root it is the user's own business


def test_what_is_something_else_is_not_written_over(tmp_path: Path) -> None:
    root = CheckpointRoot(tmp_path, "The service")
    write_checkpoint(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert root.target("a") == tmp_path / "a"
    assert root.target("empty") == tmp_path / "empty"
    assert root.target("new/deep/er") == tmp_path / "new" / "deep" / "er"
    for name in ("file", "full"):
        with pytest.raises(CheckpointError, match="not written over"):
            root.target(name)
    assert not (tmp_path / "new").exists()


def test_without_a_root_it_is_named(tmp_path: Path) -> None:
    root = CheckpointRoot(None, "The coordinator")
    for find in (root.target, root.stored, lambda path: root.partial(path, "t")):
        with pytest.raises(SettingsError, match=r"The coordinator has no directory of checkpoints.*--checkpoint-root"):
            find("a")


def test_another_root_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"Server 7 does not see the directory.*same --checkpoint-root"):
        CheckpointRoot(tmp_path, "Server 7").partial("a", "t")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda save: save.ClearField("token"),
        lambda save: setattr(save, "token", "../x"),
        lambda save: save.keys.update({"a": "x", "b": "x"}),
        lambda save: save.keys.update({"a": "kept"}),
        lambda save: save.keys.update({"a": "line\nbreak"}),
        lambda save: save.keys.update({"a": "x" * 513}),
        lambda save: save.kept.append("__metadata__"),
        lambda save: save.kept.append(""),
        lambda save: save.tied.update({"": "a"}),
    ],
)
def test_entries_that_are_not_well_formed_are_refused(spoil: Callable[[run_pb2.SaveState], None]) -> None:
    save = run_pb2.SaveState(directory="a", token="0-f", keys={"a": "b", "loss": ""}, kept=["kept"], tied={"c": "b"})
    check_save(save)
    spoil(save)
    with pytest.raises(FrameError):
        check_save(save)


@pytest.mark.parametrize("digest", ["", "0" * 63, "X" * 64])
def test_a_checkpoint_is_named_with_its_hash(digest: str) -> None:
    with pytest.raises(FrameError, match="no hash of its manifest"):
        check_stored(run_pb2.StoredState(directory="a", manifest_sha256=digest))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        DRAFT.model_copy(update={"format_version": 2}).model_dump_json(),
        DRAFT.completed({"model.safetensors": FileRecord(size_bytes=1, sha256="0" * 64)}, {}).model_dump_json(),
        DRAFT.completed({}, {"weight": {"step": 2}}).model_dump_json(),
        DRAFT.model_dump_json().replace('"step":2', '"step":-1'),
        DRAFT.model_dump_json()[:-1] + ',"more":1}',
        DRAFT.model_dump_json() + " " * 2**24,
    ],
)
def test_manifests_that_clients_must_not_send(text: str) -> None:
    assert parse_draft(DRAFT.model_dump_json()) == DRAFT
    with pytest.raises(CheckpointError):
        parse_draft(text)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_checkpoint(path)
    checkpoint = StoredCheckpoint(path)
    same = StoredCheckpoint(path, root=tmp_path, verified=checkpoint.sha256)
    assert list(same.optimizer_state()) == [("weight", "step")]
    assert same.optimizer_value("weight", "step") == 2
    checkpoint.check_unchanged()
    write_checkpoint(path, 2.0)
    for look in (
        checkpoint.check_unchanged,
        lambda: StoredCheckpoint(path, verified=checkpoint.sha256),
    ):
        with pytest.raises(CheckpointError, match="cannot be used"):
            look()


def test_names_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a")
    checkpoint = StoredCheckpoint(tmp_path / "a")
    finds: list[Callable[[], object]] = [
        lambda: checkpoint.model_tensor("bias"),
        lambda: checkpoint.optimizer_value("bias", "step"),
    ]
    for find in finds:
        with pytest.raises(CheckpointError, match="has no tensor 'bias"):
            find()


def test_every_refusal_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(GradwireError, match="no checkpoint at"):
        CheckpointRoot(tmp_path, "The service").stored("nothing")
