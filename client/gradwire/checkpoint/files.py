"""Files of a checkpoint: written once, hashed on the way, synced. Leaves to others which files there are.

Tensors are in the safetensors format (https://github.com/huggingface/safetensors#format), which any reader of it opens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from gradwire_protocol.errors import CheckpointError
from gradwire_protocol.torch_tensors import payload_of

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_PIECE_BYTES = 8 * 2**20
_ALIGNMENT = 8


class FileRecord(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write a new safetensors file and sync it. CheckpointError for an element type that the format does not have."""
    # Wide elements first, so that each tensor lies aligned to its own element size; equal content gives equal files.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _TYPES:
            raise CheckpointError(
                f"{name} cannot be written to a checkpoint",
                expected=", ".join(str(dtype) for dtype in _TYPES),
                got=str(tensor.dtype),
            )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    def contents() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            yield payload_of(tensor.detach().cpu().contiguous())

    return _write(path, contents())


def write_text(path: Path, text: str) -> FileRecord:
    """Write a new text file and sync it."""
    return _write(path, [text.encode()])


def record_of(path: Path) -> FileRecord:
    """Return size and hash of a file, reading all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size_bytes=file.tell(), sha256=digest.hexdigest())


def _write(path: Path, contents: Iterable[bytes | memoryview]) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    with path.open("xb", buffering=0) as file:
        for content in contents:
            view = memoryview(content).cast("B")
            while view:
                # In pieces that stay in the processor's cache between hashing and writing; a write may be partial.
                written = file.write(view[:_PIECE_BYTES])
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return FileRecord(size_bytes=size, sha256=digest.hexdigest())
