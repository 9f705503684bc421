"""Where a trainer's weights come from: the module itself, safetensors files here, or files that the servers read.

Finds and checks everything before a server is taken, and delivers lazily. Leaves the files' format to
gradwire_protocol, and connections to session.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradwire.session import Session
from gradwire_protocol.errors import ModelError, SettingsError
from gradwire_protocol.frames import MAXIMUM_VALUE_BYTES
from gradwire_protocol.relative_paths import check_relative
from gradwire_protocol.safetensors_format import StoredTensor
from gradwire_protocol.torch_tensors import tensor_from_file
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.weight_files import open_tensor_files, reads_from_files, stored_names

_SHOWN = 5


@dataclass(frozen=True)
class FileWeights:
    """Weights in safetensors files, which this process reads tensor by tensor and sends to the servers that need them.

    path: a .safetensors file, an index of shards (.safetensors.index.json), or a directory with either.
    prefix: only tensors of the model whose names begin with it are read, under their names without it (a checkpoint of
    `model.encoder` is read with prefix="encoder."); all others come from the module itself.
    """

    path: str | os.PathLike[str]
    prefix: str = ""


@dataclass(frozen=True)
class ServerWeights:
    """Weights that each stage server reads itself, below the directory that it was started with (--weights-root).

    directory: relative to that root, with safetensors files or an index of shards; the same on every server.
    prefix: as for FileWeights.
    """

    directory: str
    prefix: str = ""


Weights = str | os.PathLike[str] | FileWeights | ServerWeights | None


class WeightSource:
    """The initial values of one model's tensors. Holds the module's own tensors: let go of it after `deliver`."""

    def __init__(
        self, weights: Weights, model: nn.Module, proto: graph_pb2.Model, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """tensors: TensorSpec.name to the user's own. Raises DataError, SettingsError or ModelError."""
        self._tensors = tensors
        self._specs = {spec.name: spec for spec in proto.tensors}
        graphs = (proto.train, proto.evaluate, proto.predict)
        used = {use.tensor for graph in graphs for use in graph.tensors}
        self._load = run_pb2.LoadState()
        self._stored: dict[str, StoredTensor] = {}
        self._unused: list[tuple[graph_pb2.TensorSpec, StoredTensor]] = []
        self._delivered = [name for name in self._specs if name in used]
        if isinstance(weights, ServerWeights):
            self._leave_to_servers(weights, model)
        elif weights is not None:
            self._find(weights if isinstance(weights, FileWeights) else FileWeights(_path(weights)), model, used)
        self._refuse_empty(given=weights is not None)

    def deliver(self, session: Session) -> None:
        """Load the state of a new run: send what the servers do not read themselves, and wait for them all."""
        number = session.reserve()
        # Servers take each tensor as it comes, so that they need not keep many at once either.
        future = session.submit(run_pb2.Entry(number=number, load_state=self._load))
        session.stream_state(number, self._delivered, self.read)
        future.result()

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that this process delivers: from its file, or the module's own."""
        stored = self._stored.get(name)
        if stored is None:
            return self._tensors[name]
        return tensor_from_file(stored, self._specs[name].data_type)

    def unused(self) -> dict[str, torch.Tensor]:
        """Return what no graph uses, and so no server holds, as it is in the files, by all of its names."""
        found = {}
        for spec, stored in self._unused:
            found.update(dict.fromkeys(spec.names, tensor_from_file(stored, spec.data_type)))
        return found

    def _find(self, weights: FileWeights, model: nn.Module, used: set[str]) -> None:
        files = open_tensor_files(_path(weights.path))
        own = _state_names(model)
        for name, spec in self._specs.items():
            if own.isdisjoint(spec.names) or not reads_from_files(spec, weights.prefix):
                continue
            if name in used:
                self._stored[name] = files.find(spec, weights.prefix)
            elif any(stored in files for stored in stored_names(spec, weights.prefix)):
                self._unused.append((spec, files.find(spec, weights.prefix)))

    def _leave_to_servers(self, weights: ServerWeights, model: nn.Module) -> None:
        check_relative(weights.directory, "The directory of weights")
        if len(weights.prefix.encode()) > MAXIMUM_VALUE_BYTES:
            raise SettingsError("The prefix is too long", expected=f"{MAXIMUM_VALUE_BYTES} bytes at most")
        own = _state_names(model)
        read = {name for name in self._delivered if reads_from_files(self._specs[name], weights.prefix)}
        foreign = [name for name in read if own.isdisjoint(self._specs[name].names)]
        if foreign:
            raise ModelError(
                "The loss has tensors of its own, which a directory of the model's weights does not hold",
                expected="a loss without parameters and buffers, where servers read the weights",
                got=_shown(foreign),
                remedy="give the loss as a function: tensors that it refers to are sent as constants",
            )
        self._load = run_pb2.LoadState(weights_directory=weights.directory, weights_prefix=weights.prefix)
        self._delivered = [name for name in self._delivered if name not in read]

    def _refuse_empty(self, *, given: bool) -> None:
        empty = [name for name in self._delivered if name not in self._stored and self._tensors[name].is_meta]
        if empty:
            raise ModelError(
                "Tensors of the model are on the meta device, without contents",
                expected="contents in the module" + (", or a place in the weights (names below their prefix)" * given),
                got=_shown(empty),
                remedy="build these on the CPU, or give weights that hold them"
                if given
                else "give weights=… (a safetensors file or directory), or build the model on the CPU",
            )


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise SettingsError(
            "weights is not valid",
            expected="None, a path, gradwire.FileWeights(path) or gradwire.ServerWeights(directory)",
            got=repr(path),
        )
    return Path(path)


def _state_names(model: nn.Module) -> set[str]:
    """Return all names of the model's own parameters and buffers, which files can hold."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return parameters | {name for name, _ in model.named_buffers(remove_duplicate=False)}


def _shown(names: list[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
