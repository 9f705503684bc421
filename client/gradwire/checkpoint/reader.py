"""Opens a checkpoint: checks every file before anything of it is used, then reads tensors as they are asked for.

Whether it fits a model is for others to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from gradwire.checkpoint.directory import settle
from gradwire.checkpoint.files import record_of
from gradwire.checkpoint.manifest import Manifest, read_manifest
from gradwire_protocol.errors import CheckpointError

_PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
# A zip archive, as torch.save writes it, and the pickle protocols 2 to 5.
_PICKLE_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of some safetensors files, by name. Read when they are asked for, straight from the file."""

    def __init__(self, paths: list[Path]) -> None:
        """CheckpointError for a file that is not safetensors, and for a name that is in two of them."""
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file: Any = safe_open(str(path), framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} cannot be used: it is not a safetensors file" + _looks_like(path), got=str(error)
                ) from error
            for name in names:
                if name in self._files:
                    raise CheckpointError(f"{path} cannot be used: {name!r} is in another file too")
                self._files[name] = file

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Checkpoint:
    """A checkpoint that is whole. model: by the user's names; tied ones under the first only (manifest.tied)."""

    def __init__(self, path: Path) -> None:
        """Check the manifest and all files by size and hash; CheckpointError names the file and the reason."""
        self.path = path
        self.manifest = check(path)
        self.model = self._tensors("model")
        self._optimizer = self._tensors("optimizer")

    def optimizer_state(self) -> Iterator[tuple[str, str]]:
        """Yield (parameter, name of the state) of all that the optimizer kept."""
        for name in self._optimizer:
            parameter, _, state = name.rpartition("/")
            yield parameter, state
        for parameter, states in self.manifest.optimizer.numbers.items():
            for state in states:
                yield parameter, state

    def optimizer_value(self, parameter: str, state: str) -> torch.Tensor | bool | int | float:
        """Return one value of the optimizer's state."""
        numbers = self.manifest.optimizer.numbers.get(parameter, {})
        return numbers[state] if state in numbers else self._optimizer[f"{parameter}/{state}"]

    def _tensors(self, kind: Literal["model", "optimizer"]) -> Tensors:
        return Tensors([self.path / name for name in self.manifest.tensor_files(kind)])


def check(path: Path) -> Manifest:
    """Read the manifest and every file that it names; CheckpointError unless all are as they were written."""
    try:
        settle(path)
        manifest = read_manifest(path)
        for name in sorted(file.name for file in path.iterdir() if file.name not in manifest.files):
            if (path / name).suffix in _PICKLE_SUFFIXES or _looks_like(path / name):
                raise CheckpointError(
                    f"{path / name} is refused: a checkpoint holds no pickles, and it is not in the manifest",
                    expected="the files that save wrote",
                    remedy="find out who put it there; remove it if the rest is trusted",
                )
        for name, record in manifest.files.items():
            _check_file(path / name, record.size_bytes, record.sha256)
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read", got=str(error)) from error
    return manifest


def _check_file(path: Path, size_bytes: int, sha256: str) -> None:
    remedy = "load another checkpoint"
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be used: it is missing", expected=f"{size_bytes} bytes", remedy=remedy)
    size = path.stat().st_size
    if size != size_bytes:
        what = "it is truncated" if size < size_bytes else "it is too long"
        raise CheckpointError(
            f"{path} cannot be used: {what}{_looks_like(path)}",
            expected=f"{size_bytes} bytes",
            got=f"{size} bytes",
            remedy=remedy,
        )
    got = record_of(path).sha256
    if got != sha256:
        raise CheckpointError(
            f"{path} cannot be used: its content has changed since it was written{_looks_like(path)}",
            expected=f"sha256 {sha256}",
            got=got,
            remedy=remedy,
        )


def _looks_like(path: Path) -> str:
    """Say so if a file's first bytes are a pickle's; empty otherwise."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        beginning = file.read(4)
    return ", it looks like a pickle" if beginning.startswith(_PICKLE_BEGINNINGS) else ""
