"""A stage server's writer: off the compute thread, one at a time, and no failure of it is the run's."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradwire_protocol.checkpoint.directory import partial_path
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.delivery import Payload
from gradwire_protocol.errors import Aborted
from gradwire_protocol.torch_tensors import payload_of
from gradwire_protocol.v1 import run_pb2
from gradwire_stage.checkpoint_writer import CheckpointWriter, Copied, CopiedTensor

Parts = queue.SimpleQueue[run_pb2.SavedPart]


def item(name: str, tensor: torch.Tensor, payload: Payload = None) -> CopiedTensor:
    return CopiedTensor(name, tensor.dtype, tuple(tensor.shape), payload or payload_of(tensor))


def copied(entry: int = 3) -> Copied:
    save = run_pb2.SaveState(directory="a", token="t", tied={"head": "weight"})
    made = Copied(entry, 1, 7, save)
    made.model.append(item("weight", torch.arange(6.0).reshape(2, 3)))
    made.optimizer.append(item("weight/exp_avg", torch.ones(2, 3)))
    made.numbers.append(run_pb2.OptimizerNumber(parameter="weight", state="count", integer=4))
    return made


class Held:
    """A payload that comes when it is let go, as one from a device does."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self) -> memoryview:
        assert self.go.wait(10)
        return payload_of(torch.zeros(2))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    partial_path(tmp_path / "a", "t").mkdir()
    return tmp_path


def make_writer(root: Path | None, advance: Callable[[], None] = lambda: None) -> CheckpointWriter:
    return CheckpointWriter(CheckpointRoot(root, "Server x"), stage=2, who="stage 2 (server x)", advance=advance)


def test_what_was_copied_is_written_and_reported(root: Path) -> None:
    parts: Parts = queue.SimpleQueue()
    steps: list[None] = []
    make_writer(root, lambda: steps.append(None)).start(copied(), parts.put)
    part = parts.get(timeout=10)
    assert not part.HasField("failure")
    assert (part.entry, part.generation, part.weight_version) == (3, 1, 7)
    assert [file.name for file in part.files] == ["model-2-0.unfinished", "optimizer-2-0.unfinished"]
    assert [number.integer for number in part.numbers] == [4]
    folder = partial_path(root / "a", "t")
    assert torch.equal(load_file(folder / "model-2-0.unfinished")["weight"], torch.arange(6.0).reshape(2, 3))
    assert [(folder / file.name).stat().st_size for file in part.files] == [file.size_bytes for file in part.files]
    assert steps  # progress, for who watches over stalls


def test_one_is_written_at_a_time(root: Path) -> None:
    writer, parts, held = make_writer(root), Parts(), Held()
    first = copied()
    first.model.append(item("slow", torch.zeros(2), held))
    assert not writer.writing
    writer.start(first, parts.put)
    assert writer.writing
    waited = threading.Thread(target=writer.wait_free)
    waited.start()
    while writer.waiting_since is None:
        time.sleep(0.001)
    assert parts.empty()
    held.go.set()
    waited.join(10)
    assert not waited.is_alive()
    assert writer.waiting_since is None
    assert not parts.get(timeout=10).HasField("failure")


def test_the_end_of_the_run_ends_what_waits_and_what_writes(root: Path) -> None:
    writer, parts, held = make_writer(root), Parts(), Held()
    slow = copied()
    slow.model.append(item("slow", torch.zeros(2), held))
    writer.start(slow, parts.put)
    failures: list[Exception] = []

    def wait() -> None:
        try:
            writer.wait_free()
        except Aborted as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while writer.waiting_since is None:
        time.sleep(0.001)
    writer.close(Aborted("released"))
    waiting.join(10)
    assert [str(error) for error in failures] == ["released."]
    held.go.set()
    while writer.writing:
        time.sleep(0.001)
    assert parts.empty()


def failure_of(writer: CheckpointWriter, made: Copied) -> run_pb2.SavedPart:
    parts: Parts = queue.SimpleQueue()
    writer.start(made, parts.put)
    part = parts.get(timeout=10)
    assert part.HasField("failure")
    assert not part.files
    assert not part.numbers
    writer.wait_free()
    return part


def test_failures_name_server_and_reason(root: Path, tmp_path: Path) -> None:
    part = failure_of(make_writer(None), copied())
    assert "by stage 2 (server x): Server x has no directory of checkpoints" in part.failure.message
    assert "--checkpoint-root" in part.failure.remedy
    other = tmp_path / "other"
    other.mkdir()
    assert "does not see the directory" in failure_of(make_writer(other), copied()).failure.message
    (partial_path(root / "a", "t") / "optimizer-2-0.unfinished").write_text("")
    part = failure_of(make_writer(root), copied())
    assert part.failure.message == "The checkpoint a could not be written by stage 2 (server x)"
    assert "File exists" in part.failure.got
    assert "untouched" in part.failure.remedy


def test_a_type_that_files_do_not_have_is_a_failure_too(root: Path) -> None:
    made = copied()
    made.model.append(item("odd", torch.zeros(1, dtype=torch.complex128)))
    assert "odd cannot be written" in failure_of(make_writer(root), made).failure.message
