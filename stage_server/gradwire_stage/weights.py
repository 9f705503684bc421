"""Weights that this server reads itself, from safetensors files below the directory that it was started with.

Leaves the files to gradwire_protocol.weight_files, and what becomes of a tensor to entries.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from gradwire_protocol.errors import SettingsError
from gradwire_protocol.relative_paths import check_inside, check_relative
from gradwire_protocol.splits import whole_spec
from gradwire_protocol.torch_tensors import tensor_from_file
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.weight_files import open_tensor_files, reads_from_files


class ServerWeights:
    """The tensors that one LoadState entry has this server read, whole; none, if it names no directory.

    Making it finds and checks them all, and reads none. SettingsError or DataError names the file, tensor and remedy.
    """

    def __init__(self, load: run_pb2.LoadState, root: Path | None, specs: Iterable[graph_pb2.TensorSpec]) -> None:
        if not load.weights_directory:
            self._stored = {}
            return
        check_relative(load.weights_directory, "The directory of weights")
        if root is None:
            raise SettingsError(
                "This stage server has no directory of weights",
                expected="--weights-root",
                got=f"a run whose weights are in {load.weights_directory!r} below it",
                remedy="start every stage server with --weights-root DIRECTORY, or let the client send the weights",
            )
        directory = check_inside(
            root / load.weights_directory, root, f"The directory of weights {load.weights_directory!r}"
        )
        if not directory.is_dir():
            raise SettingsError(
                f"{load.weights_directory!r} is not a directory of weights", expected="a directory", got=str(directory)
            )
        files = open_tensor_files(directory, root=root)
        self._stored = {
            spec.name: files.find(whole_spec(spec), load.weights_prefix)
            for spec in specs
            if reads_from_files(spec, load.weights_prefix)
        }

    def read(self, spec: graph_pb2.TensorSpec) -> torch.Tensor | None:
        """Read one tensor, on the host; None for one that the client delivers."""
        stored = self._stored.get(spec.name)
        return None if stored is None else tensor_from_file(stored, spec.data_type)
