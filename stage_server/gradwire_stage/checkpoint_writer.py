"""Writes this server's part of checkpoints on a thread of its own, one at a time, while the compute thread goes on.

What is in a part, and when it is copied, is snapshot.py's; putting all servers' parts together is the coordinator's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog
import torch

from gradwire_protocol.checkpoint.files import Kind, TensorFiles, not_written
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.delivery import Payload
from gradwire_protocol.errors import Aborted, CheckpointError, GradwireError
from gradwire_protocol.torch_tensors import raw_tensor
from gradwire_protocol.v1 import run_pb2

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CopiedTensor:
    """A tensor that was copied, by its name in the files; its bytes are in the order of its dimensions."""

    name: str
    data_type: torch.dtype
    shape: tuple[int, ...]
    payload: Payload


@dataclass(slots=True)
class Copied:
    """What one server has copied for a SaveState entry."""

    entry: int
    generation: int
    weight_version: int
    save: run_pb2.SaveState
    model: deque[CopiedTensor] = field(default_factory=deque)
    optimizer: deque[CopiedTensor] = field(default_factory=deque)
    numbers: list[run_pb2.OptimizerNumber] = field(default_factory=list)


class CheckpointWriter:
    """The writes of one run on this server. `wait_free` and `start` for the compute thread, the rest for any.

    who: how errors name this server. advance: counts progress.
    """

    def __init__(self, root: CheckpointRoot, *, stage: int, who: str, advance: Callable[[], None]) -> None:
        self._root = root
        self._stage = stage
        self._who = who
        self._advance = advance
        self._changed = threading.Condition()
        self._writing = ""  # the directory of the checkpoint in progress
        self._waiting_since: float | None = None
        self._closed: GradwireError | None = None

    @property
    def waiting_since(self) -> float | None:
        """Since when the compute thread waits for the write before; None: it does not."""
        return self._waiting_since

    @property
    def writing(self) -> bool:
        """Whether a part is being written."""
        return bool(self._writing)

    def wait_free(self) -> None:
        """Wait until nothing is being written; raises why the run has been ended."""
        with self._changed:
            self._waiting_since = time.monotonic()
            try:
                self._changed.wait_for(lambda: self._closed is not None or not self._writing)
            finally:
                self._waiting_since = None
            if self._closed is not None:
                raise self._closed

    def start(self, copied: Copied, on_done: Callable[[run_pb2.SavedPart], None]) -> None:
        """Write what was copied; `on_done` is called on the writing thread, unless the run is ended before."""
        with self._changed:
            self._writing = copied.save.directory

        def run() -> None:
            part = run_pb2.SavedPart(
                entry=copied.entry, generation=copied.generation, weight_version=copied.weight_version
            )
            try:
                self._write(copied, part)
            except Aborted:
                return
            except Exception as error:  # noqa: BLE001  # whatever it is: reported, and no reason to end the run
                failure = self._failure_of(copied, error)
                _log.warning("a checkpoint could not be written", directory=copied.save.directory, error=str(failure))
                part.ClearField("files")
                part.ClearField("numbers")
                part.failure.message = failure.message
                part.failure.expected, part.failure.got = failure.expected, failure.got
                part.failure.remedy = failure.remedy
            finally:
                with self._changed:
                    self._writing = ""
                    self._changed.notify_all()
            on_done(part)

        threading.Thread(target=run, name=f"write {copied.save.directory}", daemon=True).start()

    def close(self, reason: GradwireError) -> None:
        """End the wait of `wait_free` with `reason`, and the write in progress, which leaves its files. Idempotent."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def _write(self, copied: Copied, part: run_pb2.SavedPart) -> None:
        directory = self._root.partial(copied.save.directory, copied.save.token)
        of_kind: tuple[tuple[Kind, deque[CopiedTensor], Mapping[str, str]], ...] = (
            ("model", copied.model, copied.save.tied),
            ("optimizer", copied.optimizer, {}),
        )
        for kind, tensors, tied in of_kind:
            files = TensorFiles(directory, f"{kind}-{self._stage}", tied=tied, go_on=self._go_on)
            while tensors:
                # Not kept here: its memory goes when its file is written.
                item = tensors.popleft()
                files.add(raw_tensor(item.name, item.data_type, item.shape, item.payload))
                del item
            for name, record in files.finish():
                part.files.add(name=name, size_bytes=record.size_bytes, sha256=record.sha256)
        part.numbers.extend(copied.numbers)

    def _go_on(self) -> None:
        if self._closed is not None:
            raise Aborted("The run has ended while a checkpoint was written")
        self._advance()

    def _failure_of(self, copied: Copied, error: Exception) -> GradwireError:
        if isinstance(error, OSError):
            return not_written(copied.save.directory, self._who, error)
        if isinstance(error, GradwireError):
            return CheckpointError(
                f"The checkpoint {copied.save.directory} could not be written by {self._who}: {error.message}",
                expected=error.expected,
                got=error.got,
                remedy=error.remedy,
            )
        _log.error("unforeseen error while a checkpoint was written", exc_info=error)
        return CheckpointError(
            f"The checkpoint {copied.save.directory} could not be written by {self._who}",
            got=f"{type(error).__name__}: {error}",
            remedy="see the stage server's log; please report it",
        )
