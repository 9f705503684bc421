"""A checkpoint's tensors and numbers, as the client needs them: from its own disk, or as the coordinator tells.

Leaves to gradwire_protocol.checkpoint whether it is whole, and to state.py whether it fits the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from gradwire_protocol.checkpoint.manifest import FILE_NAME, Manifest, parse_manifest
from gradwire_protocol.checkpoint.reader import Number, StoredCheckpoint, optimizer_state
from gradwire_protocol.errors import CheckpointError
from gradwire_protocol.safetensors_format import StoredTensor
from gradwire_protocol.torch_tensors import TORCH_TYPES, tensor_from_file
from gradwire_protocol.v1 import coordinator_pb2


class DescribedCheckpoint(Protocol):
    """What is known of a checkpoint without reading its tensors."""

    path: Path
    manifest: Manifest
    # By the user's names, without contents (on the meta device); tied ones under the first only (manifest.tied).
    described: dict[str, torch.Tensor]

    def optimizer_state(self) -> Iterator[tuple[str, str]]:
        """Yield (parameter, name of the state) of all that the optimizer kept."""


class LocalCheckpoint:
    """A checkpoint on this process's disk, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        """Check the manifest and all files by size and hash; CheckpointError names the file and the reason."""
        self._stored = StoredCheckpoint(path)
        self.path = path
        self.manifest = self._stored.manifest
        self.described = {
            name: _described(path, name, stored.data_type, stored.shape) for name, stored in self._stored.model.items()
        }

    def optimizer_state(self) -> Iterator[tuple[str, str]]:
        """Yield (parameter, name of the state) of all that the optimizer kept."""
        return self._stored.optimizer_state()

    def tensor(self, name: str) -> torch.Tensor:
        """Read one of the model's tensors."""
        return _read(self._stored.model_tensor(name))

    def optimizer_value(self, parameter: str, state: str) -> torch.Tensor | Number:
        """Return one value of the optimizer's state."""
        value = self._stored.optimizer_value(parameter, state)
        return _read(value) if isinstance(value, StoredTensor) else value

    def check_unchanged(self) -> None:
        """CheckpointError if another checkpoint has taken its place while it was read."""
        self._stored.check_unchanged()


class RemoteCheckpoint:
    """A checkpoint that the coordinator has checked, and that servers will read."""

    def __init__(self, path: Path, reply: coordinator_pb2.InspectCheckpointReply) -> None:
        self.path = path
        self.manifest = parse_manifest(path / FILE_NAME, reply.manifest)
        self.sha256 = reply.manifest_sha256
        self.described = {item.name: _described(path, item.name, item.data_type, item.shape) for item in reply.model}
        self._optimizer = [item.name for item in reply.optimizer]

    def optimizer_state(self) -> Iterator[tuple[str, str]]:
        """Yield (parameter, name of the state) of all that the optimizer kept."""
        return optimizer_state(self._optimizer, self.manifest)


def _read(stored: StoredTensor) -> torch.Tensor:
    return tensor_from_file(stored, stored.data_type)


def _described(path: Path, name: str, data_type: int, shape: Iterable[int]) -> torch.Tensor:
    if data_type not in TORCH_TYPES:
        raise CheckpointError(f"{path} cannot be used: {name!r} has a type that this version does not know")
    return torch.empty(tuple(shape), dtype=TORCH_TYPES[data_type], device="meta")
