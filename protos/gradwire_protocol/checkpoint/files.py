"""Files of a checkpoint: written once, hashed on the way, synced, of bounded size. Leaves to others what is in them.

Tensors are in the safetensors format (https://github.com/huggingface/safetensors#format), which any reader of it opens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gradwire_protocol.delivery import Payload
from gradwire_protocol.errors import CheckpointError
from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.safetensors_format import STORED_TYPES, read_header

SHARD_BYTES = 2 * 2**30
Kind = Literal["model", "optimizer"]
KINDS: tuple[Kind, ...] = ("model", "optimizer")
_PIECE_BYTES = 8 * 2**20
_ALIGNMENT = 8


class FileRecord(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as a file has it: name, type (of STORED_TYPES), shape, and its bytes in the order of the dimensions."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    payload: Payload

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[STORED_TYPES[self.type_name]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes

    def contents(self) -> memoryview:
        """Return the bytes, waiting for them if need be."""
        data = self.payload() if callable(self.payload) else self.payload
        return memoryview(b"") if data is None else data


def _go_on() -> None:
    """Do nothing: a write that nobody stops."""


class TensorFiles:
    """Writes tensors of one kind into safetensors files of about `shard_bytes`, under names without meaning yet.

    stem: what these names begin with. tied: further name of a tensor → the name that has it, for the headers.
    go_on: called again and again while writing; raises to stop it.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        *,
        tied: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
        go_on: Callable[[], None] = _go_on,
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._tied = tied
        self._shard_bytes = shard_bytes
        self._go_on = go_on
        self._waiting: dict[str, RawTensor] = {}
        self._waiting_bytes = 0
        self._written: list[tuple[str, FileRecord]] = []

    def add(self, tensor: RawTensor) -> None:
        """Take a tensor; write a file when enough are together."""
        if self._waiting and self._waiting_bytes + tensor.size_bytes > self._shard_bytes:
            self._write()
        self._waiting[tensor.name] = tensor
        self._waiting_bytes += tensor.size_bytes

    def finish(self) -> list[tuple[str, FileRecord]]:
        """Write the rest; return the name and record of each file, none if there was no tensor."""
        if self._waiting:
            self._write()
        return self._written

    def _write(self) -> None:
        name = unfinished_name(self._stem, len(self._written))
        tied = {other: first for other, first in self._tied.items() if first in self._waiting}
        tensors, self._waiting, self._waiting_bytes = list(self._waiting.values()), {}, 0
        self._written.append((name, write_safetensors(self._directory / name, tensors, tied, go_on=self._go_on)))


def unfinished_name(stem: str, number: int) -> str:
    """Return the name of a file while it is not known how many there are."""
    return f"{stem}-{number}.unfinished"


def name_files(
    directory: Path, kind: Kind, written: Sequence[tuple[str, FileRecord]], tied: Mapping[str, str]
) -> dict[str, FileRecord]:
    """Give files their last names; return all files of this kind, by name.

    The names are those that Hugging Face's libraries use: model.safetensors, or model-00001-of-00002.safetensors and
    so on with model.safetensors.index.json. CheckpointError for a tensor that is in two of them.
    """
    single = f"{kind}.safetensors"
    if not written:
        return {single: write_safetensors(directory / single, [], tied)}
    if len(written) == 1:
        name, record = written[0]
        (directory / name).rename(directory / single)
        return {single: record}
    files: dict[str, FileRecord] = {}
    places: dict[str, str] = {}
    total_bytes = 0
    for index, (unfinished, record) in enumerate(written, start=1):
        name = f"{kind}-{index:05}-of-{len(written):05}.safetensors"
        (directory / unfinished).rename(directory / name)
        files[name] = record
        for tensor, stored in read_header(directory / name).items():
            if tensor in places:
                raise CheckpointError(
                    f"{tensor!r} is in two files of one checkpoint", got=f"{places[tensor]} and {name}"
                )
            places[tensor] = name
            total_bytes += stored.size_bytes
    content = {"metadata": {"total_size": total_bytes, **tied}, "weight_map": places}
    index_name = f"{kind}.safetensors.index.json"
    files[index_name] = write_text(directory / index_name, json.dumps(content, indent=2) + "\n")
    return files


def write_safetensors(
    path: Path, tensors: Iterable[RawTensor], metadata: Mapping[str, str], *, go_on: Callable[[], None] = _go_on
) -> FileRecord:
    """Write a new safetensors file and sync it."""
    # Wide elements first, so that each tensor lies aligned to its own element size; equal content gives equal files.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.element_bytes, tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.size_bytes
        header[tensor.name] = {
            "dtype": tensor.type_name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    def contents() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in ordered:
            yield tensor.contents()

    return _write(path, contents(), go_on)


def write_text(path: Path, text: str) -> FileRecord:
    """Write a new text file and sync it."""
    return _write(path, [text.encode()], _go_on)


def not_written(path: Path | str, by: str, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint that `by` (empty: this process) could not write."""
    return CheckpointError(
        f"The checkpoint {path} could not be written{by and ' by '}{by}",
        got=str(error),
        remedy="free space or choose another path; what was saved there before is untouched",
    )


def record_of(path: Path) -> FileRecord:
    """Return size and hash of a file, reading all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size_bytes=file.tell(), sha256=digest.hexdigest())


def _write(path: Path, contents: Iterable[bytes | memoryview], go_on: Callable[[], None]) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    with path.open("xb", buffering=0) as file:
        for content in contents:
            view = memoryview(content).cast("B")
            while view:
                go_on()
                # In pieces that stay in the processor's cache between hashing and writing; a write may be partial.
                written = file.write(view[:_PIECE_BYTES])
                digest.update(view[:written])
                size += written
                view = view[written:]
        os.fsync(file.fileno())
    return FileRecord(size_bytes=size, sha256=digest.hexdigest())
