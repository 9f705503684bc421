"""Saves a run's state, and takes it from where it was saved: by this process, or by the servers themselves.

Leaves connections to session.py, what is in a checkpoint to contents.py, and files to the modules beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from gradwire.checkpoint.background import Save, Saves
from gradwire.checkpoint.contents import RunContents
from gradwire.checkpoint.reader import LocalCheckpoint
from gradwire.checkpoint.servers import ServerStorage
from gradwire.checkpoint.snapshot import Snapshot
from gradwire.optimizers import OptimizerReader
from gradwire.session import Session
from gradwire.state import StateNames
from gradwire_protocol.checkpoint.manifest import Manifest
from gradwire_protocol.checkpoint.root import check_target
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.v1 import graph_pb2, run_pb2

# Who writes and reads the files.
Storage = Literal["client", "server"]


class RunCheckpoints:
    """The checkpoints of one run. For the trainer's thread; files are written on another, or elsewhere."""

    def __init__(
        self,
        session: Session,
        names: StateNames,
        optimizer: OptimizerReader,
        model: graph_pb2.Model,
        *,
        tensors: Mapping[str, torch.Tensor],
        seed: int,
    ) -> None:
        """tensors: TensorSpec.name to the user's own; constants and the like are kept, being in no checkpoint."""
        self._session = session
        self._names = names
        # Servers that share a stage owe each other's replicas parts, which no checkpoint has.
        sharded = any(server.shard for server in session.servers)
        replicas = set() if sharded else {server.replica for server in session.servers}
        self._contents = RunContents(names, optimizer, model, seed, replicas)
        self._saves = Saves()
        held = dict.fromkeys(name for server in session.servers for name in server.tensors)
        self._held = list(held)
        self._fixed = {name: tensors[name] for name in held if not names.has(name)}
        self._servers = ServerStorage(session, names, self._fixed)

    def save(self, path: Path, step: int, data_position: Mapping[str, Any] | None, storage: Storage) -> Save:
        """Put a snapshot behind all entries so far into the log; it is written while later entries go on."""
        _check_storage(storage)
        draft = self._contents.draft(step, data_position)
        if storage == "client":
            check_target(path)
        self._saves.settle()
        self.report()  # before anything is in the log: the user may have made errors of warnings
        kept = self._contents.kept()
        if storage == "server":
            return self._saves.start(path, step, self._servers.begin_save(path, draft, kept))
        number = self._session.reserve()
        entry = run_pb2.Entry(number=number, fetch_state=run_pb2.FetchState(optimizer_state=True))
        snapshot = Snapshot(self._session, self._names, number, self._session.submit(entry), kept)
        return self._saves.start(path, step, lambda: snapshot.write(path, draft))

    def load(self, path: Path, storage: Storage) -> Manifest:
        """Check a checkpoint and that it fits, then put it into the log; return its manifest when all servers have it.

        CheckpointError for a file that is not whole, and for another model or optimizer: then nothing has changed.
        """
        _check_storage(storage)
        self._saves.settle()
        return self._load_from_servers(path) if storage == "server" else self._load_from_here(path)

    def report(self) -> None:
        """Warn of a failed write that nobody has been told of."""
        self._saves.report()

    def settle(self) -> None:
        """Wait until nothing is being written."""
        self._saves.settle()

    def _load_from_servers(self, path: Path) -> Manifest:
        checkpoint = self._servers.inspect(path)
        states = self._contents.check(checkpoint)
        kept = self._servers.load(checkpoint, states, self._contents.kept_keys(checkpoint))
        self._contents.loaded(checkpoint.manifest, kept)
        return checkpoint.manifest

    def _load_from_here(self, path: Path) -> Manifest:
        checkpoint = LocalCheckpoint(path)
        states = self._contents.check(checkpoint)
        number = self._session.reserve()
        load = run_pb2.LoadState(
            optimizer_state=[run_pb2.OptimizerStateName(parameter=name, state=state) for name, state in states],
            weight_version=checkpoint.manifest.step,
        )
        # The entry goes first: servers take the tensors as they come, when the entries before are done.
        future = self._session.submit(run_pb2.Entry(number=number, load_state=load))
        self._session.stream_state(
            number,
            self._held,
            lambda name: self._fixed[name] if name in self._fixed else checkpoint.tensor(self._names.key_of(name)),
        )
        self._session.stream_optimizer_state(
            number, states, lambda name, state: checkpoint.optimizer_value(self._names.key_of(name), state)
        )
        future.result()
        kept = {key: checkpoint.tensor(key) for key in self._contents.kept_keys(checkpoint)}
        checkpoint.check_unchanged()
        self._contents.loaded(checkpoint.manifest, kept)
        return checkpoint.manifest


def _check_storage(storage: str) -> None:
    if storage not in get_args(Storage):
        expected = " or ".join(map(repr, get_args(Storage)))
        raise SettingsError("storage is not valid", expected=expected, got=repr(storage))
