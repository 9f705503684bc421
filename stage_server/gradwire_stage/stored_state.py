"""A checkpoint that this server reads itself: tensors and the optimizer's state by name, only what it needs.

The coordinator has checked the files; leaves them to gradwire_protocol.checkpoint, and what becomes of a tensor to
entries.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradwire_protocol.checkpoint.reader import StoredCheckpoint
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.safetensors_format import StoredTensor
from gradwire_protocol.torch_tensors import tensor_from_file
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_stage.optimizer import StateValue
from gradwire_stage.snapshot import is_saved


class StoredState:
    """The checkpoint of one LoadState entry. Making it reads no tensor; CheckpointError or SettingsError."""

    def __init__(self, stored: run_pb2.StoredState, root: CheckpointRoot) -> None:
        self._checkpoint = StoredCheckpoint(
            root.stored(stored.directory), root=root.path(), verified=stored.manifest_sha256
        )
        self._keys = stored.keys
        self._kept = stored.kept

    def read(self, spec: graph_pb2.TensorSpec) -> torch.Tensor | None:
        """Read one tensor, on the host; None for one that the client delivers."""
        key = self._key(spec.name)
        return _read(self._checkpoint.model_tensor(key)) if key and is_saved(spec) else None

    def state(self, item: run_pb2.OptimizerStateName) -> StateValue:
        """Return one value of the optimizer's state: a tensor on the host, or a number."""
        value = self._checkpoint.optimizer_value(self._key(item.parameter), item.state)
        return _read(value) if isinstance(value, StoredTensor) else value

    def kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read what no server holds, one after the other, with its name."""
        return ((name, _read(self._checkpoint.model_tensor(name))) for name in self._kept)

    def check_unchanged(self) -> None:
        """CheckpointError if another checkpoint has taken its place while it was read."""
        self._checkpoint.check_unchanged()

    def _key(self, name: str) -> str:
        return self._keys.get(name, name)


def _read(stored: StoredTensor) -> torch.Tensor:
    return tensor_from_file(stored, stored.data_type)
