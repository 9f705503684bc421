"""The user's state dict: which of its keys live on which server's tensors, and which stayed in the user's module.

Says also whether the tensors of a checkpoint, by these keys, are the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradwire_protocol.errors import CheckpointError
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import graph_pb2

_NAMES_SHOWN = 5


class StateNames:
    """The keys of a model's state dict, in order. Keeps nothing of the module but what no server holds."""

    def __init__(self, model: nn.Module, specs: Iterable[graph_pb2.TensorSpec], held: Iterable[str]) -> None:
        """held: TensorSpec.name of all tensors that a server delivers."""
        held = frozenset(held)
        on_servers = [spec for spec in specs if spec.name in held]
        servers_names = {alias: spec.name for spec in on_servers for alias in spec.names}
        self._specs = {spec.name: spec for spec in on_servers}
        self._sources: dict[str, str] = {}
        self._kept: dict[str, Any] = {}
        state = model.state_dict()
        self._keys = tuple(state)
        for key, value in state.items():
            if key in servers_names:
                self._sources[key] = servers_names[key]
            else:
                self._kept[key] = value
        # The first key of each of the servers' tensors, which stands for it in files.
        self._first = {name: key for key, name in reversed(self._sources.items())}

    def assemble(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the state dict. tensors: TensorSpec.name to tensor; tied keys share one."""
        return {key: tensors[self._sources[key]] if key in self._sources else self._kept[key] for key in self._keys}

    def has(self, tensor: str) -> bool:
        """Whether a server's tensor has a key: those of a loss that is a module have none."""
        return tensor in self._first

    def key_of(self, tensor: str) -> str:
        """Return the first key of a server's tensor, by TensorSpec.name."""
        return self._first[tensor]

    def tensor_of(self, key: str) -> str | None:
        """Return TensorSpec.name for a key; None if no server holds it."""
        return self._sources.get(key)

    def tied(self) -> dict[str, str]:
        """Return each further key of a server's tensor, and the first one."""
        return {key: self._first[name] for key, name in self._sources.items() if key != self._first[name]}

    def kept(self) -> dict[str, torch.Tensor]:
        """Return what no server holds, by key. CheckpointError for what is not a tensor."""
        strange = [key for key, value in self._kept.items() if not isinstance(value, torch.Tensor)]
        if strange:
            raise CheckpointError(
                f"The model's state has {strange[0]!r}, which is not a tensor: checkpoints hold no Python objects",
                expected="tensors",
                got=repr(type(self._kept[strange[0]])),
                remedy="register it as a buffer, or leave it out of the state dict",
            )
        return dict(self._kept)

    def keep(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put other values in the place of what no server holds."""
        self._kept |= values

    def check(
        self,
        path: Path,
        stored: Mapping[str, torch.Tensor],
        tied: Mapping[str, str],
        kept: Mapping[str, torch.Tensor],
    ) -> None:
        """CheckpointError unless a checkpoint's tensors are this model's: names, shapes, element types, ties.

        kept: what no server holds, as far as it has contents.
        """
        wanted = {
            key: (tuple(self._specs[name].shape), TORCH_TYPES[self._specs[name].data_type])
            for name, key in self._first.items()
        }
        wanted |= {key: (tuple(value.shape), value.dtype) for key, value in kept.items()}
        missing = [f"{key} (tied to {tied[key]} there)" if key in tied else key for key in wanted if key not in stored]
        own_ties = self.tied()
        unexpected = [
            f"{key} (tied to {own_ties[key]} here)" if key in own_ties else key
            for key in stored
            if key not in wanted and key not in self._kept
        ]
        different = [
            f"{key}: {_kind(*wanted[key])} here, {_kind(tensor.shape, tensor.dtype)} there"
            for key, tensor in stored.items()
            if key in wanted and wanted[key] != (tuple(tensor.shape), tensor.dtype)
        ]
        found = (("missing", missing), ("unexpected", unexpected), ("different", different))
        if missing or unexpected or different:
            raise CheckpointError(
                f"{path} is a checkpoint of another model",
                expected="the model's own parameters and buffers",
                got="; ".join(f"{what}: {_shown(names)}" for what, names in found if names),
                remedy="make the trainer with the model that was saved",
            )


def _kind(shape: Iterable[int], data_type: torch.dtype) -> str:
    return f"{list(shape)} of {str(data_type).removeprefix('torch.')}"


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
