"""The coordinator's part of checkpoints that servers write: whole in their place, or not at all."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradwire_coordinator.saves import RunSaves, Writer
from gradwire_protocol.checkpoint.directory import partial_path
from gradwire_protocol.checkpoint.files import TensorFiles
from gradwire_protocol.checkpoint.manifest import Manifest, SavedOptimizer
from gradwire_protocol.checkpoint.reader import check
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.errors import CheckpointError, FrameError, SettingsError
from gradwire_protocol.torch_tensors import raw_from
from gradwire_protocol.v1 import run_pb2

DRAFT = Manifest(versions={}, step=7, seed=0, tied={"head": "a"}, optimizer=SavedOptimizer(name="SGD", groups=()))

WRITERS = {place: Writer(place, f"stage {place}") for place in (0, 1)}


class Run:
    """What a run does for its checkpoints, with two servers."""

    def __init__(self, root: Path | None) -> None:
        self.finished: list[tuple[str, int]] = []
        self.outcomes: queue.SimpleQueue[run_pb2.SaveOutcome] = queue.SimpleQueue()
        self.saves = RunSaves(CheckpointRoot(root, "The coordinator"), WRITERS, self.done)
        self.root = root
        self.entry = 0

    def done(self, outcome: run_pb2.SaveOutcome, directory: str, step: int) -> None:
        self.finished.append((directory, step))
        self.saves.forget(outcome.entry)
        self.outcomes.put(outcome)

    def begin(self, directory: str = "a") -> Path:
        """Announce and dispatch; return where servers write."""
        assert self.root is not None
        token = self.saves.begin(directory, DRAFT.model_dump_json())
        self.saves.check(run_pb2.SaveState(directory=directory, token=token))
        self.entry += 1
        self.saves.dispatched(self.entry)
        return partial_path(self.root / directory, token)

    def part(self, stage: int, folder: Path, name: str) -> run_pb2.SavedPart:
        part = run_pb2.SavedPart(entry=self.entry, weight_version=7)
        files = TensorFiles(folder, f"model-{stage}", tied=DRAFT.tied)
        files.add(raw_from(name, torch.full((3,), float(stage))))
        for file, record in files.finish():
            part.files.add(name=file, size_bytes=record.size_bytes, sha256=record.sha256)
        part.numbers.add(parameter=name, state="step", real=1.5)
        return part

    def failure(self) -> run_pb2.SaveFailure:
        outcome = self.outcomes.get(timeout=10)
        assert outcome.HasField("failure")
        return outcome.failure


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def names(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


def test_the_parts_of_all_servers_become_a_checkpoint(run: Run, tmp_path: Path) -> None:
    folder = run.begin("deep/a")
    run.saves.take(1, run.part(1, folder, "b"))
    assert run.outcomes.empty()
    assert len(run.saves) == 1
    run.saves.take(0, run.part(0, folder, "a"))
    assert run.outcomes.get(timeout=10) == run_pb2.SaveOutcome(entry=1)
    assert run.finished == [("deep/a", 7)]
    assert not run.saves
    manifest = check(tmp_path / "deep" / "a")
    assert manifest.optimizer.numbers == {"a": {"step": 1.5}, "b": {"step": 1.5}}
    assert manifest.tied == {"head": "a"}
    assert names(tmp_path / "deep") == ["a"]
    first = load_file(tmp_path / "deep" / "a" / "model-00001-of-00002.safetensors")
    assert torch.equal(first["a"], torch.zeros(3))


def fail(run: Run, folder: Path, spoil: str) -> None:
    first, second = run.part(0, folder, "a"), run.part(1, folder, "a" if spoil == "twice" else "b")
    match spoil:
        case "gone":
            (folder / first.files[0].name).unlink()
        case "shorter":
            (folder / first.files[0].name).write_bytes(b"")
        case "link":
            (folder / first.files[0].name).rename(folder.parent / "elsewhere")
            (folder / first.files[0].name).symlink_to(folder.parent / "elsewhere")
        case "name":
            first.files[0].name = "model-0-0.unfinished/../../x"
        case "of another":
            first.files[0].CopyFrom(second.files[0])
        case "more":
            (folder / "weights.pt").write_bytes(b"")
        case "step":
            second.weight_version = 8
        case "failed":
            second.ClearField("files")
            second.failure.message, second.failure.got = "The disk of stage 1 is full", "No space left"
    run.saves.take(0, first)
    run.saves.take(1, second)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("gone", "does not see what stage 0 has written"),
        ("shorter", "does not see what stage 0 has written"),
        ("link", "does not see what stage 0 has written"),
        ("name", "stage 0 reported a wrong file"),
        ("of another", "stage 0 reported a wrong file"),
        ("more", "something else in the checkpoint"),
        ("step", "another step"),
        ("twice", "'a' is in two files"),
        ("failed", "disk of stage 1 is full"),
    ],
)
def test_what_is_not_as_reported_is_no_checkpoint(run: Run, tmp_path: Path, spoil: str, words: str) -> None:
    folder = run.begin()
    run.saves.take(0, run.part(0, folder, "a"))
    run.saves.take(1, run.part(1, folder, "b"))
    run.outcomes.get(timeout=10)
    before = check(tmp_path / "a")
    fail(run, run.begin(), spoil)
    assert words in run.failure().message
    assert check(tmp_path / "a") == before
    assert set(names(tmp_path)) <= {"a", "elsewhere"}


def test_only_what_was_announced_is_saved(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="not announced"):
        run.saves.check(run_pb2.SaveState(directory="a", token="t"))
    first = run.saves.begin("a", DRAFT.model_dump_json())
    second = run.saves.begin("b", DRAFT.model_dump_json())
    assert names(tmp_path) == [f".b.{second}.partial"]
    with pytest.raises(FrameError, match="not announced"):
        run.saves.check(run_pb2.SaveState(directory="a", token=first))
    run.saves.check(run_pb2.SaveState(directory="b", token=second))
    with pytest.raises(FrameError, match="was not to write"):
        run.saves.take(0, run_pb2.SavedPart(entry=1))
    run.saves.dispatched(1)
    run.saves.take(0, run_pb2.SavedPart(entry=1))
    with pytest.raises(FrameError, match="was not to write"):
        run.saves.take(0, run_pb2.SavedPart(entry=1))


def test_the_end_of_the_run_removes_what_is_not_whole(run: Run, tmp_path: Path) -> None:
    folder = run.begin()
    run.saves.take(0, run.part(0, folder, "a"))
    run.saves.begin("b", DRAFT.model_dump_json())
    run.saves.close()
    run.saves.close()
    assert names(tmp_path) == []
    with pytest.raises(CheckpointError, match="the run has ended"):
        run.saves.begin("c", DRAFT.model_dump_json())
    assert names(tmp_path) == []


def test_the_end_of_the_run_waits_for_what_lacks_only_its_manifest(tmp_path: Path) -> None:
    run = Run(tmp_path)
    held = threading.Event()
    done = run.done

    def slow(outcome: run_pb2.SaveOutcome, directory: str, step: int) -> None:
        assert held.wait(10)
        done(outcome, directory, step)

    run.saves = RunSaves(CheckpointRoot(tmp_path, "The coordinator"), WRITERS, slow)
    folder = run.begin()
    run.saves.take(0, run.part(0, folder, "a"))
    run.saves.take(1, run.part(1, folder, "b"))
    closing = threading.Thread(target=run.saves.close)
    closing.start()
    held.set()
    closing.join(10)
    assert run.outcomes.get(timeout=10) == run_pb2.SaveOutcome(entry=1)
    check(tmp_path / "a")


def test_what_cannot_be_begun_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--checkpoint-root"):
        Run(None).saves.begin("a", DRAFT.model_dump_json())
    run = Run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/a.* could not be written by the coordinator.*File exists"):
        run.saves.begin("file/a", DRAFT.model_dump_json())
    with pytest.raises(CheckpointError, match="manifest"):
        run.saves.begin("a", "{}")
    with pytest.raises(SettingsError, match="relative"):
        run.saves.begin("../a", DRAFT.model_dump_json())
    assert names(tmp_path) == ["file"]


def test_a_server_of_another_replica_has_nothing_to_write(run: Run) -> None:
    folder = run.begin()
    with pytest.raises(FrameError, match="not to write"):
        run.saves.take(2, run.part(2, folder, "c"))
