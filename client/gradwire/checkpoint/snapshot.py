"""One snapshot's way from the servers to the client's disk. Whatever fails, the servers get rid of it, and training
goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from gradwire.collecting import Result
from gradwire.session import Session
from gradwire.state import StateNames
from gradwire_protocol.checkpoint.directory import replaced
from gradwire_protocol.checkpoint.files import TensorFiles, name_files, not_written, write_text
from gradwire_protocol.checkpoint.manifest import FILE_NAME, Manifest
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.torch_tensors import raw_from
from gradwire_protocol.v1 import run_pb2

Numbers = dict[str, dict[str, bool | int | float]]


class Snapshot:
    """The results of a FetchState entry, yet to be collected. For one thread, which need not be the trainer's.

    kept: tensors of the model that no server holds, by key.
    """

    def __init__(
        self,
        session: Session,
        names: StateNames,
        number: int,
        future: Future[run_pb2.EntryResult],
        kept: Mapping[str, torch.Tensor],
    ) -> None:
        self._session = session
        self._names = names
        self._number = number
        self._future = future
        self._kept = kept

    def write(self, path: Path, draft: Manifest) -> None:
        """Collect it and write it to `path`. CheckpointError, or the run's own failure.

        draft: the manifest, but for the optimizer's numbers and the files.
        """
        collecting = _Collecting(self._names)
        try:
            with replaced(path) as directory:
                model = TensorFiles(directory, "model", tied=draft.tied)
                optimizer = TensorFiles(directory, "optimizer", tied={})
                for key, tensor in self._kept.items():
                    model.add(raw_from(key, tensor))
                collecting.begin(model, optimizer)
                self._session.collect_each(self._number, collecting.take)
                self._future.result()
                collecting.check()
                files = name_files(directory, "model", model.finish(), draft.tied)
                files |= name_files(directory, "optimizer", optimizer.finish(), {})
                write_text(directory / FILE_NAME, draft.completed(files, collecting.numbers).to_text())
        except OSError as error:
            raise not_written(path, "", error) from error
        finally:
            if not collecting.begun:
                # A server whose results nobody takes would wait for it when its outbox is full.
                self._session.collect_each(self._number, collecting.take)


class _Collecting:
    """Takes results on the threads of several servers. After a failure the rest is only taken off their hands."""

    def __init__(self, names: StateNames) -> None:
        self.numbers: Numbers = {}
        self.begun = False
        self._names = names
        self._files: tuple[TensorFiles, TensorFiles] | None = None
        self._lock = threading.Lock()
        self._failure: OSError | GradwireError | None = None

    def begin(self, model: TensorFiles, optimizer: TensorFiles) -> None:
        self.begun = True
        self._files = (model, optimizer)

    def take(self, result: Result) -> None:
        # Those of a loss that is a module are not part of the model's state.
        if self._files is None or not self._names.has(result.value):
            return
        with self._lock:
            if self._failure is None:
                try:
                    self._add(result, *self._files)
                except (OSError, GradwireError) as error:
                    self._failure = error

    def check(self) -> None:
        """Raise the first failure of `take`."""
        if self._failure is not None:
            raise self._failure

    def _add(self, result: Result, model: TensorFiles, optimizer: TensorFiles) -> None:
        key = self._names.key_of(result.value)
        if isinstance(result.content, torch.Tensor):
            if result.state:
                optimizer.add(raw_from(f"{key}/{result.state}", result.content))
            else:
                model.add(raw_from(key, result.content))
        elif result.content is not None:
            self.numbers.setdefault(key, {})[result.state] = result.content
