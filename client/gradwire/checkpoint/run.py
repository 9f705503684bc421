"""Saves a run's state to disk, and takes it from there: what goes into a checkpoint, and whether it fits the run.

Leaves connections to session.py, and files to the modules beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradwire.checkpoint.background import Save, Saves
from gradwire.checkpoint.manifest import FILE_NAME, Manifest, SavedGroup, SavedOptimizer
from gradwire.checkpoint.reader import Checkpoint
from gradwire.checkpoint.snapshot import Snapshot
from gradwire.optimizers import OptimizerReader
from gradwire.session import Session
from gradwire.state import StateNames
from gradwire_protocol.errors import CheckpointError, SettingsError
from gradwire_protocol.v1 import graph_pb2, run_pb2


class RunCheckpoints:
    """The checkpoints of one run. For the trainer's thread; files are written on another."""

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
        self._optimizer = optimizer
        self._seed = seed
        self._random = any(node.random for node in model.train.nodes)
        self._saves = Saves()
        held = dict.fromkeys(name for server in session.servers for name in server.tensors)
        self._held = list(held)
        self._fixed = {name: tensors[name] for name in held if not names.has(name)}

    def save(self, path: Path, step: int, data_position: Mapping[str, Any] | None) -> Save:
        """Put a snapshot behind all entries so far into the log; write it while later entries go on."""
        position = _checked_position(data_position)
        _check_target(path)
        self._saves.settle()
        kept = {key: value.detach().clone() for key, value in self._kept().items()}
        groups = tuple(
            SavedGroup(parameters=tuple(members), settings=settings)
            for members, settings in zip(self._members(), self._optimizer.settings(), strict=True)
        )
        name = self._optimizer.name
        number = self._session.reserve()
        entry = run_pb2.Entry(number=number, fetch_state=run_pb2.FetchState(optimizer_state=True))
        snapshot = Snapshot(self._session, self._names, number, self._session.submit(entry), kept)

        def write() -> None:
            snapshot.write(
                path,
                lambda numbers, tied, files: Manifest(
                    step=step,
                    seed=self._seed,
                    data_position=position,
                    tied=tied,
                    optimizer=SavedOptimizer(name=name, groups=groups, numbers=numbers),
                    files=files,
                ),
            )

        return self._saves.start(path, step, write)

    def load(self, path: Path) -> Manifest:
        """Check a checkpoint and that it fits, then put it into the log; return its manifest when all servers have it.

        CheckpointError for a file that is not whole, and for another model or optimizer: then nothing has changed.
        """
        self._saves.settle()
        checkpoint = Checkpoint(path)
        manifest = checkpoint.manifest
        if self._random and manifest.seed != self._seed:
            raise CheckpointError(
                f"{path} was saved by a run with another seed: dropout would not continue as it was",
                expected=f"seed={manifest.seed}",
                got=f"seed={self._seed}",
                remedy=f"make the trainer with seed={manifest.seed}",
            )
        self._names.check(path, checkpoint.model, manifest.tied, self._kept())
        self._check_groups(path, manifest.optimizer)
        states = self._optimizer_state(checkpoint)
        number = self._session.reserve()
        load = run_pb2.LoadState(
            optimizer_state=[run_pb2.OptimizerStateName(parameter=name, state=state) for name, state in states],
            weight_version=manifest.step,
        )
        # The entry goes first: servers take the tensors as they come, when the entries before are done.
        future = self._session.submit(run_pb2.Entry(number=number, load_state=load))
        self._session.stream_state(
            number,
            self._held,
            lambda name: self._fixed[name] if name in self._fixed else checkpoint.model[self._names.key_of(name)],
        )
        self._session.stream_optimizer_state(
            number, states, lambda name, state: checkpoint.optimizer_value(self._names.key_of(name), state)
        )
        future.result()
        kept = self._names.kept()
        self._names.keep({key: checkpoint.model[key].clone() for key in checkpoint.model if key in kept})
        self._optimizer.restore([group.settings for group in manifest.optimizer.groups])
        return manifest

    def report(self) -> None:
        """Warn of a failed write that nobody has been told of."""
        self._saves.report()

    def settle(self) -> None:
        """Wait until nothing is being written."""
        self._saves.settle()

    def _kept(self) -> dict[str, torch.Tensor]:
        """Return what no server holds, by key, as far as it has contents."""
        return {key: value for key, value in self._names.kept().items() if not value.is_meta}

    def _check_groups(self, path: Path, saved: SavedOptimizer) -> None:
        if saved.name != self._optimizer.name:
            raise CheckpointError(
                f"{path} was saved with another optimizer",
                expected=saved.name,
                got=self._optimizer.name,
                remedy=f"make the trainer with torch.optim.{saved.name}",
            )
        members = self._members()
        if [sorted(names) for names in members] != [sorted(group.parameters) for group in saved.groups]:
            raise CheckpointError(
                f"{path} was saved with other parameter groups",
                expected=f"groups of {[len(group.parameters) for group in saved.groups]} parameters",
                got=f"groups of {[len(names) for names in members]}, or of other members",
                remedy="make the optimizer's groups as they were",
            )

    def _members(self) -> list[list[str]]:
        """Return the keys of each group's members, but for those that no graph reads: they never get any state."""
        return [
            [self._names.key_of(name) for name in names if self._names.has(name)] for names in self._optimizer.members
        ]

    def _optimizer_state(self, checkpoint: Checkpoint) -> list[tuple[str, str]]:
        """Return (parameter, state) of all that the checkpoint has, by the servers' names."""
        trained = {name for members in self._optimizer.members for name in members}
        states = []
        for parameter, state in checkpoint.optimizer_state():
            name = self._names.tensor_of(parameter)
            if name is None or name not in trained or not state:
                raise CheckpointError(
                    f"{checkpoint.path} has optimizer state that no parameter of the run takes",
                    got=f"{parameter}/{state}",
                )
            states.append((name, state))
        return states


def _checked_position(position: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the position as JSON gives it back."""
    if position is None:
        return None
    try:
        plain = json.loads(json.dumps(dict(position)))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            "data_position cannot be written as JSON",
            expected="a dict of numbers, text, lists and dicts",
            got=str(error),
        ) from error
    if plain != dict(position):
        raise SettingsError(
            "data_position would not come back as it is",
            expected="text as keys, lists instead of tuples",
            got=repr(position),
        )
    return dict(plain)


def _check_target(path: Path) -> None:
    """Refuse to put a checkpoint in the place of something else."""
    try:
        occupied = (
            path.exists() and not (path / FILE_NAME).is_file() and not (path.is_dir() and not any(path.iterdir()))
        )
    except OSError as error:
        raise CheckpointError(f"A checkpoint cannot be written to {path}", got=str(error)) from error
    if occupied:
        raise CheckpointError(
            f"{path} is not a checkpoint, and is not written over",
            expected="a path that is free, or a checkpoint's",
            remedy="give another path",
        )
