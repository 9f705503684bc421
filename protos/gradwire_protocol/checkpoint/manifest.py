"""The manifest of a checkpoint: what was saved, when, and the size and hash of every file, its own text included."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from gradwire_protocol.checkpoint.files import FileRecord
from gradwire_protocol.errors import CheckpointError

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1
# Far above what a model of a hundred thousand tensors needs.
_MAXIMUM_BYTES = 2**28
# Of one that travels in a message: a few hundred bytes for each parameter.
MAXIMUM_SENT_BYTES = 2**24
_DIGEST = "sha256"
_TENSOR_FILE = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors")
_INDEX_FILE = re.compile(r"(model|optimizer)\.safetensors\.index\.json")


class SavedGroup(BaseModel):
    """A parameter group: its members, and its settings as the next step would have used them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: tuple[str, ...]
    settings: dict[str, JsonValue]


class SavedOptimizer(BaseModel):
    """The optimizer but for its tensors. numbers: parameter → name of the state → value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    groups: tuple[SavedGroup, ...]
    numbers: dict[str, dict[str, bool | int | float]] = {}


class Manifest(BaseModel):
    """What a checkpoint is, without its tensors.

    versions: of the distributions that the trainer ran. step: training steps that the state has seen. tied: further
    names of a tensor → the name that has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["gradwire-checkpoint"] = "gradwire-checkpoint"
    format_version: int = FORMAT_VERSION
    versions: dict[str, str]
    step: int = Field(ge=0, le=2**48)
    seed: int = Field(ge=0, lt=2**63)
    data_position: dict[str, JsonValue] | None = None
    tied: dict[str, str] = {}
    optimizer: SavedOptimizer
    files: dict[str, FileRecord] = {}

    @field_validator("files")
    @classmethod
    def _are_ours(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        strange = [name for name in files if not (_TENSOR_FILE.fullmatch(name) or _INDEX_FILE.fullmatch(name))]
        if strange:
            raise ValueError(f"not a file of a checkpoint: {', '.join(strange)}")
        return files

    def tensor_files(self, kind: Literal["model", "optimizer"]) -> list[str]:
        """Return the names of the safetensors files, in order."""
        return sorted(name for name in self.files if name.startswith(kind) and _TENSOR_FILE.fullmatch(name))

    def completed(self, files: dict[str, FileRecord], numbers: dict[str, dict[str, bool | int | float]]) -> Manifest:
        """Return the manifest with what is known when the files are written."""
        optimizer = self.optimizer.model_copy(update={"numbers": numbers})
        return self.model_copy(update={"files": files, "optimizer": optimizer})

    def to_text(self) -> str:
        """Return the manifest as JSON, with the hash of all the rest."""
        content = self.model_dump(mode="json")
        return json.dumps(content | {_DIGEST: _digest(content)}, indent=2) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """Read a checkpoint's manifest; CheckpointError for what is not one, or is not whole."""
    return parse_manifest(directory / FILE_NAME, manifest_text(directory))


def manifest_text(directory: Path) -> bytes:
    """Read the text of a checkpoint's manifest; CheckpointError if there is none."""
    path = directory / FILE_NAME
    try:
        if not directory.is_dir():
            raise CheckpointError(f"There is no checkpoint at {directory}", expected="a directory that save made")
        if not path.is_file():
            raise _refused(path, "it is missing: the directory is no checkpoint, or not a whole one")
        if path.stat().st_size > _MAXIMUM_BYTES:
            raise _refused(path, f"it has more than {_MAXIMUM_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _refused(path, str(error)) from error


def parse_manifest(path: Path, text: bytes | str) -> Manifest:
    """Check a manifest's text, which came from `path`; CheckpointError for what is not one, or is not whole."""
    try:
        content = json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"it is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != "gradwire-checkpoint":
        raise _refused(path, "it is not the manifest of a checkpoint")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written by another version of Gradwire",
            expected=f"format_version {FORMAT_VERSION}",
            got=str(content.get("format_version")),
            remedy="load it with that version",
        )
    if content.pop(_DIGEST, None) != _digest(content):
        raise _refused(path, "its content does not have the hash that it was written with")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise _refused(path, _first(error)) from error


def parse_draft(text: str) -> Manifest:
    """Check a manifest that a client sends before there are any files; CheckpointError for what is not one."""
    size = len(text.encode(errors="replace"))
    if size > MAXIMUM_SENT_BYTES:
        raise CheckpointError(
            "The manifest of a checkpoint is too long to be sent",
            expected=f"{MAXIMUM_SENT_BYTES} bytes at most",
            got=str(size),
            remedy="make data_position shorter, or let the client write the checkpoint",
        )
    try:
        draft = Manifest.model_validate(json.loads(text))
    except ValidationError as error:
        raise CheckpointError("This is not the manifest of a checkpoint", got=_first(error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("This is not the manifest of a checkpoint", got=f"no JSON: {error}") from error
    if draft.format_version != FORMAT_VERSION or draft.files or draft.optimizer.numbers:
        raise CheckpointError(
            "This is not the manifest of a checkpoint that is yet to be written",
            expected=f"format_version {FORMAT_VERSION}, no files, none of the optimizer's numbers",
        )
    return draft


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used: {reason}",
        expected="the file as save wrote it",
        remedy="load another checkpoint",
    )
