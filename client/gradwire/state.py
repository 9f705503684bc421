"""The user's state dict: which of its keys live on which server's tensors, and which stayed in the user's module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gradwire_protocol.v1 import graph_pb2


class StateNames:
    """The keys of a model's state dict, in order. Keeps nothing of the module but what no server holds."""

    def __init__(self, model: nn.Module, specs: Iterable[graph_pb2.TensorSpec], held: Iterable[str]) -> None:
        """held: TensorSpec.name of all tensors that a server delivers."""
        held = frozenset(held)
        servers_names = {alias: spec.name for spec in specs if spec.name in held for alias in spec.names}
        self._sources: dict[str, str] = {}
        self._kept: dict[str, Any] = {}
        state = model.state_dict()
        self._keys = tuple(state)
        for key, value in state.items():
            if key in servers_names:
                self._sources[key] = servers_names[key]
            else:
                self._kept[key] = value

    def assemble(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the state dict. tensors: TensorSpec.name to tensor; tied keys share one."""
        return {key: tensors[self._sources[key]] if key in self._sources else self._kept[key] for key in self._keys}
