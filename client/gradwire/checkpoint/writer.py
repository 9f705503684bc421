"""Writes a checkpoint's contents into a directory as they come, in files of bounded size, and the manifest last.

Leaves to others that the directory appears whole (directory.py), and where the contents come from.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gradwire.checkpoint.files import FileRecord, write_tensors, write_text
from gradwire.checkpoint.manifest import FILE_NAME, Manifest

SHARD_BYTES = 2 * 2**30


class TensorFiles:
    """Tensors of one kind in safetensors files of about `shard_bytes`: one, or several with an index beside them.

    The names are those that Hugging Face's libraries use: model.safetensors, or model-00001-of-00002.safetensors and
    so on with model.safetensors.index.json.
    """

    def __init__(self, directory: Path, kind: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._kind = kind
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._total_bytes = 0
        self._records: list[FileRecord] = []
        self._shard_of: dict[str, int] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; write a file when enough are together."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self._shard_bytes:
            self._write_shard()
        self._waiting[name] = tensor
        self._waiting_bytes += size
        self._total_bytes += size

    def finish(self, metadata: dict[str, str]) -> dict[str, FileRecord]:
        """Write the rest; return all files. metadata: for the header of a single file."""
        if not self._records:
            name = f"{self._kind}.safetensors"
            return {name: write_tensors(self._directory / name, self._waiting, metadata)}
        self._write_shard()
        names = [
            f"{self._kind}-{index:05}-of-{len(self._records):05}.safetensors"
            for index in range(1, len(self._records) + 1)
        ]
        for index, name in enumerate(names):
            self._unnamed(index).rename(self._directory / name)
        content = {
            "metadata": {"total_size": self._total_bytes, **metadata},
            "weight_map": {tensor: names[shard] for tensor, shard in self._shard_of.items()},
        }
        index_name = f"{self._kind}.safetensors.index.json"
        record = write_text(self._directory / index_name, json.dumps(content, indent=2) + "\n")
        return dict(zip(names, self._records, strict=True)) | {index_name: record}

    def _write_shard(self) -> None:
        shard = len(self._records)
        self._records.append(write_tensors(self._unnamed(shard), self._waiting, {}))
        self._shard_of |= dict.fromkeys(self._waiting, shard)
        self._waiting = {}
        self._waiting_bytes = 0

    def _unnamed(self, shard: int) -> Path:
        """Name of a shard while their number is not known."""
        return self._directory / f"{self._kind}-{shard}.unfinished"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes the directory a checkpoint."""
    write_text(directory / FILE_NAME, manifest.to_text())
