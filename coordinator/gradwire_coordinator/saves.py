"""The checkpoints of one run that its servers write: from the client's announcement to the directory in its place.

Makes the directory that servers write into, and, when all have reported, gives the files their names and writes the
manifest, last. Leaves to others: the log and its streams (`run.py`), the format (`gradwire_protocol.checkpoint`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import structlog

from gradwire_protocol.checkpoint.directory import Replacement
from gradwire_protocol.checkpoint.files import (
    KINDS,
    FileRecord,
    Kind,
    name_files,
    not_written,
    unfinished_name,
    write_text,
)
from gradwire_protocol.checkpoint.manifest import FILE_NAME, Manifest, parse_draft
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.errors import CheckpointError, FrameError, GradwireError, LimitExceeded, SettingsError
from gradwire_protocol.v1 import run_pb2

_log = structlog.get_logger(__name__)

# Announced, or being written.
_MAXIMUM_OPEN = 16
# How long the end of a run waits for a checkpoint whose files are all there.
_CLOSE_SECONDS = 10.0


@dataclass(slots=True)
class _Save:
    """A checkpoint that is announced, or being written."""

    directory: str
    token: str
    draft: Manifest
    replacement: Replacement
    entry: int = 0  # 0: not in the log yet
    # By position of the server.
    parts: dict[int, run_pb2.SavedPart] = field(default_factory=dict)
    finishing: bool = False


class Writer(NamedTuple):
    """A server that writes. stage: its first one, which names its files; name: in errors."""

    stage: int
    name: str


class RunSaves:
    """The checkpoints of one run. Thread-safe; `on_done` is called on a thread of its own, and then `forget` is due."""

    def __init__(
        self,
        root: CheckpointRoot,
        writers: Mapping[int, Writer],
        on_done: Callable[[run_pb2.SaveOutcome, str, int], None],
    ) -> None:
        """`writers`: those of the run's servers that write, by position. on_done: how it ended, directory and step."""
        self._root = root
        self._writers = dict(writers)
        self._on_done = on_done
        self._changed = threading.Condition()
        self._announced: _Save | None = None
        self._open: dict[int, _Save] = {}
        self._closed = False

    def __len__(self) -> int:
        """Number of checkpoints that are in the log and not done."""
        return len(self._open)

    def begin(self, directory: str, manifest: str) -> str:
        """Make the directory that servers write into; return the token of it.

        One announcement is kept: another takes its place. CheckpointError or SettingsError, and then nothing is made.
        """
        draft = parse_draft(manifest)
        target = self._root.target(directory)
        token = uuid.uuid4().hex[:12]
        with self._changed:
            if len(self._open) >= _MAXIMUM_OPEN:
                raise LimitExceeded(
                    "Too many checkpoints are being written",
                    expected=f"{_MAXIMUM_OPEN} at most",
                    remedy="wait for those before",
                )
        try:
            save = _Save(directory, token, draft, Replacement(target, token))
        except OSError as error:
            raise not_written(directory, "the coordinator", error) from error
        with self._changed:
            before, self._announced = self._announced, save
            closed = self._closed
        if before is not None:
            before.replacement.close()
        if closed:
            self.close()
            raise CheckpointError(f"The checkpoint {directory} cannot be written: the run has ended")
        return token

    def check(self, save: run_pb2.SaveState) -> None:
        """FrameError unless a SaveState entry is the one that was announced."""
        with self._changed:
            known = self._announced
        if known is None or (known.directory, known.token) != (save.directory, save.token):
            raise FrameError(
                "A SaveState entry was not announced",
                expected="directory and token of the last BeginSave",
                got=f"{save.directory[:80]!r}, {save.token[:80]!r}",
            )

    def dispatched(self, entry: int) -> None:
        """The announced checkpoint is in the log."""
        with self._changed:
            save, self._announced = self._announced, None
            if save is not None:
                save.entry = entry
                self._open[entry] = save

    def take(self, position: int, part: run_pb2.SavedPart) -> None:
        """Take a server's report of what it has written. FrameError if none is owed."""
        with self._changed:
            save = self._open.get(part.entry)
            if save is None or position in save.parts or position not in self._writers:
                raise FrameError("A server reported a checkpoint that it was not to write", got=f"entry {part.entry}")
            save.parts[position] = part
            if len(save.parts) < len(self._writers) or self._closed:
                return
            save.finishing = True
        threading.Thread(target=self._finish, args=(save,), name=f"finish {save.directory}", daemon=True).start()

    def forget(self, entry: int) -> None:
        """A checkpoint is done, and its client will hear of it."""
        with self._changed:
            del self._open[entry]
            self._changed.notify_all()

    def close(self) -> None:
        """The run has ended: let what only lacks its manifest be finished, and remove the rest. Idempotent."""
        with self._changed:
            self._closed = True
            saves = list(self._open.values())
            if self._announced is not None:
                saves.append(self._announced)
                self._announced = None
            deadline = time.monotonic() + _CLOSE_SECONDS
            while any(save.finishing for save in self._open.values()) and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())
        for save in saves:
            if not save.finishing:
                save.replacement.close()

    def _finish(self, save: _Save) -> None:
        outcome = run_pb2.SaveOutcome(entry=save.entry)
        try:
            self._put_together(save)
        except Exception as error:  # noqa: BLE001  # whatever it is: the client is told, and the run goes on
            failure = _failure_of(save, error)
            outcome.failure.message = failure.message
            outcome.failure.expected, outcome.failure.got = failure.expected, failure.got
            outcome.failure.remedy = failure.remedy
            _log.warning("checkpoint not written", directory=save.directory, error=str(failure))
        else:
            _log.info("checkpoint written", directory=save.directory, step=save.draft.step)
        finally:
            save.replacement.close()
        self._on_done(outcome, save.directory, save.draft.step)

    def _put_together(self, save: _Save) -> None:
        parts = [(writer, save.parts[position]) for position, writer in sorted(self._writers.items())]
        for writer, part in parts:
            if part.HasField("failure"):
                failure = part.failure
                raise CheckpointError(
                    failure.message, expected=failure.expected, got=failure.got, remedy=failure.remedy
                )
            for file in part.files:
                if not file.name.startswith(tuple(f"{kind}-" for kind in KINDS)):
                    raise CheckpointError(f"{writer.name} reported a wrong file", got=repr(file.name[:80]))
        directory = save.replacement.directory
        files: dict[str, FileRecord] = {}
        for kind in KINDS:
            written = [item for writer, part in parts for item in self._files(directory, writer, part, kind)]
            files |= name_files(directory, kind, written, save.draft.tied if kind == "model" else {})
        left = {path.name for path in directory.iterdir()} - files.keys()
        if left:
            raise CheckpointError(
                f"There is something else in the checkpoint {save.directory}",
                expected="the files that servers have reported",
                got=", ".join(sorted(left)[:5]),
            )
        numbers: dict[str, dict[str, bool | int | float]] = {}
        for _, part in parts:
            if part.weight_version != save.draft.step:
                raise CheckpointError(
                    f"The checkpoint {save.directory} would have another step than its weights",
                    expected=f"step {save.draft.step}",
                    got=f"step {part.weight_version}",
                )
            for number in part.numbers:
                value = getattr(number, str(number.WhichOneof("value")))
                numbers.setdefault(number.parameter, {})[number.state] = value
        write_text(directory / FILE_NAME, save.draft.completed(files, numbers).to_text())
        save.replacement.commit()

    def _files(
        self, directory: Path, writer: Writer, part: run_pb2.SavedPart, kind: Kind
    ) -> list[tuple[str, FileRecord]]:
        """Return what a server has written of one kind; CheckpointError unless it is here, too."""
        files = [file for file in part.files if file.name.startswith(f"{kind}-")]
        for number, file in enumerate(files):
            if file.name != unfinished_name(f"{kind}-{writer.stage}", number):
                raise CheckpointError(f"{writer.name} reported a wrong file", got=repr(file.name[:80]))
            path = directory / file.name
            size = path.stat().st_size if path.is_file() and not path.is_symlink() else None
            if size != file.size_bytes:
                raise SettingsError(
                    f"The coordinator does not see what {writer.name} has written",
                    expected=f"{path} of {file.size_bytes} bytes",
                    got="nothing there" if size is None else f"{size} bytes",
                    remedy="start the coordinator and every stage server with the same --checkpoint-root",
                )
        return [(file.name, FileRecord(size_bytes=file.size_bytes, sha256=file.sha256)) for file in files]


def _failure_of(save: _Save, error: Exception) -> GradwireError:
    if isinstance(error, OSError):
        return not_written(save.directory, "the coordinator", error)
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, GradwireError):
        return CheckpointError(
            f"The checkpoint {save.directory} could not be written: {error.message}",
            expected=error.expected,
            got=error.got,
            remedy=error.remedy,
        )
    _log.error("unforeseen error while a checkpoint was finished", exc_info=error)
    return not_written(save.directory, "the coordinator", error)
