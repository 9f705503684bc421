"""The safetensors format: what a file's header says, checked, and the bytes of one tensor. Knows no torch.

A file is eight bytes of length, a JSON header of that length, and the data
(https://github.com/huggingface/safetensors#format). Nothing is trusted: sizes are checked before memory is taken.
Which files there are, and which tensor of them is wanted, is for others.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from gradwire_protocol.errors import DataError
from gradwire_protocol.frames import ELEMENT_BYTES, MAXIMUM_DIMENSIONS
from gradwire_protocol.v1 import tensors_pb2 as pb

_LENGTH_BYTES = 8
_MAXIMUM_HEADER_BYTES = 100_000_000  # the format's own limit

# The format's names of types.
STORED_TYPES: dict[str, pb.DataType] = {
    "F64": pb.DATA_TYPE_FLOAT64,
    "F32": pb.DATA_TYPE_FLOAT32,
    "F16": pb.DATA_TYPE_FLOAT16,
    "BF16": pb.DATA_TYPE_BFLOAT16,
    "I64": pb.DATA_TYPE_INT64,
    "I32": pb.DATA_TYPE_INT32,
    "I16": pb.DATA_TYPE_INT16,
    "I8": pb.DATA_TYPE_INT8,
    "U8": pb.DATA_TYPE_UINT8,
    "BOOL": pb.DATA_TYPE_BOOL,
    "C64": pb.DATA_TYPE_COMPLEX64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `size_bytes` of `file` from `offset`, contiguous, little-endian."""

    name: str
    file: Path
    type_name: str  # as the file says it
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def data_type(self) -> pb.DataType:
        """Its type; unspecified for one that the format knows and Gradwire does not."""
        return STORED_TYPES.get(self.type_name, pb.DATA_TYPE_UNSPECIFIED)

    def read(self) -> bytearray:
        """Read the tensor's bytes into memory of its own. DataError if the file no longer has them."""
        data = bytearray(self.size_bytes)
        view, position = memoryview(data), 0
        descriptor, _ = _open(self.file)
        try:
            while position < self.size_bytes:
                count = os.preadv(descriptor, [view[position:]], self.offset + position)
                if count == 0:
                    raise DataError(
                        f"{self.file} ends within tensor '{self.name}'",
                        expected=f"{self.size_bytes} bytes from byte {self.offset}",
                        got=f"{position} bytes",
                        remedy="it was changed while in use: leave weights alone while a trainer is made from them",
                    )
                position += count
        except OSError as error:
            raise DataError(f"Tensor '{self.name}' cannot be read from {self.file}", got=str(error)) from error
        finally:
            os.close(descriptor)
        return data


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one file; the data must fill the rest of the file."""
    descriptor, size = _open(file)
    try:
        length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
        if size < _LENGTH_BYTES or not 2 <= length <= min(_MAXIMUM_HEADER_BYTES, size - _LENGTH_BYTES):
            raise damaged(file, "a header within the file", f"{size} bytes, of which the header would be {length}")
        header = _parse(file, os.pread(descriptor, length, _LENGTH_BYTES))
    finally:
        os.close(descriptor)
    start = _LENGTH_BYTES + length
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, start) for name, entry in header.items()}
    end = max((stored.offset + stored.size_bytes for stored in tensors.values()), default=start)
    if end != size:
        last = max(tensors.values(), key=lambda stored: stored.offset, default=None)
        what = f"{end} bytes, the last for tensor '{last.name}'" if last else f"{end} bytes"
        raise damaged(file, what, f"{size} bytes" + (": it is truncated" if size < end else ""))
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size, without repeated names."""
    descriptor, size = _open(file)
    try:
        if size > _MAXIMUM_HEADER_BYTES:
            raise damaged(file, f"{_MAXIMUM_HEADER_BYTES} bytes at most", f"{size}")
        return _parse(file, os.pread(descriptor, size, 0))
    finally:
        os.close(descriptor)


def _stored(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """Check one entry of a header."""
    where = f"of tensor '{name[:200]}'"
    if not name.isprintable():
        raise damaged(file, "names of tensors that can be shown", ascii(name[:200]))
    if not isinstance(entry, dict) or not _is_type_name(entry.get("dtype")):
        raise damaged(file, f"type, shape and place {where}", "something else")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or len(shape) > MAXIMUM_DIMENSIONS:
        raise damaged(file, f"a shape {where}", repr(shape)[:200])
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(file, f"a place {where}", repr(offsets)[:200])
    stored = StoredTensor(name, file, entry["dtype"], tuple(shape), start + offsets[0], offsets[1] - offsets[0])
    element = ELEMENT_BYTES.get(stored.data_type)
    if element is not None and math.prod(shape) * element != stored.size_bytes:
        raise damaged(
            file, f"{math.prod(shape) * element} bytes {where}, {entry['dtype']} {shape}", f"{stored.size_bytes}"
        )
    return stored


def _is_type_name(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.isascii() and value.isidentifier() and len(value) <= 32


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(file, "JSON", str(error)) from error
    if not isinstance(parsed, dict):
        raise damaged(file, "a JSON object", type(parsed).__name__)
    return parsed


def _open(file: Path) -> tuple[int, int]:
    """Open a regular file for reading; return its descriptor and size."""
    try:
        # Opening a pipe would wait for whoever writes to it.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DataError(
            f"The weights file {file} cannot be read",
            expected="a file that this process may read",
            got=str(error),
            remedy="check the name and its permissions; of shards, all must be there",
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise damaged(file, "a regular file", stat.filemode(status.st_mode))
    return descriptor, status.st_size


def damaged(file: Path, expected: str, got: str) -> DataError:
    """Return the error for a file that is not what its name says."""
    return DataError(
        f"{file} is not a sound safetensors file or index",
        expected=expected,
        got=got,
        remedy="copy or download it again",
    )
