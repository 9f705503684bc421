"""What a checkpoint of one run has in it, and whether one that is to be loaded fits the run.

Knows the user's names, groups and seed; leaves tensors to those who save and load them.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from gradwire.checkpoint.reader import DescribedCheckpoint
from gradwire.optimizers import OptimizerReader
from gradwire.state import StateNames
from gradwire_protocol.checkpoint.manifest import Manifest, SavedGroup, SavedOptimizer
from gradwire_protocol.errors import CheckpointError, SettingsError
from gradwire_protocol.exchange_state import parse_owed_name
from gradwire_protocol.v1 import graph_pb2


class RunContents:
    """The contents of one run's checkpoints, by the user's names."""

    def __init__(
        self,
        names: StateNames,
        optimizer: OptimizerReader,
        model: graph_pb2.Model,
        seed: int,
        replicas: Collection[int],
    ) -> None:
        """replicas: ids of those of the run."""
        self._names = names
        self._optimizer = optimizer
        self._seed = seed
        self._replicas = frozenset(replicas)
        self._random = any(node.random for node in model.train.nodes)

    def draft(self, step: int, position: Mapping[str, Any] | None) -> Manifest:
        """Return the manifest of a checkpoint that is saved now, but for its files and the optimizer's numbers."""
        checked = _checked_position(position)
        groups = tuple(
            SavedGroup(parameters=tuple(members), settings=settings)
            for members, settings in zip(self._members(), self._optimizer.settings(), strict=True)
        )
        return Manifest(
            versions={name: importlib.metadata.version(name) for name in ("gradwire", "torch")},
            step=step,
            seed=self._seed,
            data_position=checked,
            tied=self._names.tied(),
            optimizer=SavedOptimizer(name=self._optimizer.name, groups=groups),
        )

    def kept(self) -> dict[str, torch.Tensor]:
        """Return copies of what no server holds, by key, as far as it has contents."""
        return {key: value.detach().clone() for key, value in self._kept().items()}

    def check(self, checkpoint: DescribedCheckpoint) -> list[tuple[str, str]]:
        """CheckpointError unless a checkpoint fits the run.

        Returns (parameter, state) of all of the optimizer's state in it, and of what this run's replicas keep for their
        exchange, by the servers' names.
        """
        path, manifest = checkpoint.path, checkpoint.manifest
        if self._random and manifest.seed != self._seed:
            raise CheckpointError(
                f"{path} was saved by a run with another seed: dropout would not continue as it was",
                expected=f"seed={manifest.seed}",
                got=f"seed={self._seed}",
                remedy=f"make the trainer with seed={manifest.seed}",
            )
        self._names.check(path, checkpoint.described, manifest.tied, self._kept())
        self._check_groups(path, manifest.optimizer)
        return self._optimizer_state(checkpoint)

    def kept_keys(self, checkpoint: DescribedCheckpoint) -> list[str]:
        """Return the keys of all that a checkpoint has and no server holds."""
        kept = self._names.kept()
        return [key for key in checkpoint.described if key in kept]

    def loaded(self, manifest: Manifest, kept: Mapping[str, torch.Tensor]) -> None:
        """Take note that the servers have a checkpoint's state. kept: what none of them holds."""
        self._names.keep(kept)
        self._optimizer.restore([group.settings for group in manifest.optimizer.groups])

    def _kept(self) -> dict[str, torch.Tensor]:
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

    def _optimizer_state(self, checkpoint: DescribedCheckpoint) -> list[tuple[str, str]]:
        trained = {name for members in self._optimizer.members for name in members}
        states = []
        for parameter, state in checkpoint.optimizer_state():
            name = self._names.tensor_of(parameter)
            if name is None or name not in trained or not state:
                raise CheckpointError(
                    f"{checkpoint.path} has optimizer state that no parameter of the run takes",
                    got=f"{parameter}/{state}",
                )
            owed = parse_owed_name(state)
            if owed is None or (len(self._replicas) > 1 and owed[0] in self._replicas):
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
