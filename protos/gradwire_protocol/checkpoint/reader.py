"""Opens a checkpoint: checks every file before anything of it is used, and tells where each tensor lies.

Whether it fits a model, and what becomes of the tensors' bytes, is for others to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from gradwire_protocol.checkpoint.directory import settle
from gradwire_protocol.checkpoint.files import Kind, record_of
from gradwire_protocol.checkpoint.manifest import FILE_NAME, Manifest, manifest_text, parse_manifest
from gradwire_protocol.errors import CheckpointError, DataError
from gradwire_protocol.relative_paths import check_inside
from gradwire_protocol.safetensors_format import StoredTensor, read_header

Number = bool | int | float

_PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
# A zip archive, as torch.save writes it, and the pickle protocols 2 to 5.
_PICKLE_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_REMEDY = "load another checkpoint"


def optimizer_state(tensors: Iterable[str], manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield (parameter, name of the state) of all that an optimizer kept, by its tensors' names and its numbers."""
    for name in tensors:
        parameter, _, state = name.rpartition("/")
        yield parameter, state
    for parameter, states in manifest.optimizer.numbers.items():
        for state in states:
            yield parameter, state


class StoredCheckpoint:
    """A checkpoint on disk. model, optimizer: its tensors, by the names that files have them under.

    sha256: of the manifest's text, which stands for all of it, the files' hashes being in there.
    """

    def __init__(self, path: Path, *, root: Path | None = None, verified: str = "") -> None:
        """Check the manifest and all files by size and hash; CheckpointError names the file and the reason.

        root: every file must lie below it, links included. verified: hash of the manifest of a checkpoint whose files
        somebody else has checked; it must be this one.
        """
        self.path = path
        try:
            settle(path)
            _check_places(path, root)
            self.text = manifest_text(path)
            self.sha256 = hashlib.sha256(self.text).hexdigest()
            if verified and verified != self.sha256:
                raise self._changed("it is not the one that was checked", verified)
            self.manifest = parse_manifest(path / FILE_NAME, self.text)
            if not verified:
                _check_files(path, self.manifest, root)
            self.model = self._tensors("model", root)
            self.optimizer = self._tensors("optimizer", root)
        except OSError as error:
            raise CheckpointError(f"The checkpoint {path} cannot be read", got=str(error)) from error

    def optimizer_state(self) -> Iterator[tuple[str, str]]:
        """Yield (parameter, name of the state) of all that the optimizer kept."""
        return optimizer_state(self.optimizer, self.manifest)

    def optimizer_value(self, parameter: str, state: str) -> StoredTensor | Number:
        """Return one value of the optimizer's state; CheckpointError if it has none."""
        numbers = self.manifest.optimizer.numbers.get(parameter, {})
        if state in numbers:
            return numbers[state]
        return self._found(self.optimizer, f"{parameter}/{state}")

    def model_tensor(self, name: str) -> StoredTensor:
        """Return one of the model's tensors; CheckpointError if it is not there."""
        return self._found(self.model, name)

    def check_unchanged(self) -> None:
        """CheckpointError if another checkpoint has taken its place since: what was read is then of both."""
        now = hashlib.sha256(manifest_text(self.path)).hexdigest()
        if now != self.sha256:
            raise self._changed("it was replaced while it was read", self.sha256)

    def _found(self, tensors: dict[str, StoredTensor], name: str) -> StoredTensor:
        stored = tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}", remedy=_REMEDY)
        return stored

    def _changed(self, what: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be used: {what}",
            expected=f"a manifest with the sha256 {expected}",
            got="another",
            remedy="see that all --checkpoint-root are one directory, and that nobody writes there while it is loaded",
        )

    def _tensors(self, kind: Kind, root: Path | None) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for file in self.manifest.tensor_files(kind):
            path = self.path / file
            _check_place(path, root)
            try:
                header = read_header(path)
            except DataError as error:
                raise CheckpointError(
                    f"{path} cannot be used: it is not a safetensors file{_looks_like(path)}",
                    expected=error.expected,
                    got=error.got,
                    remedy=_REMEDY,
                ) from error
            for name, stored in header.items():
                if name in tensors:
                    raise CheckpointError(f"{path} cannot be used: {name!r} is in another file too", remedy=_REMEDY)
                tensors[name] = stored
        return tensors


def check(path: Path) -> Manifest:
    """Read the manifest and every file that it names; CheckpointError unless all are as they were written."""
    return StoredCheckpoint(path).manifest


def _check_files(path: Path, manifest: Manifest, root: Path | None) -> None:
    for name in sorted(file.name for file in path.iterdir() if file.name not in manifest.files):
        if (path / name).suffix in _PICKLE_SUFFIXES or _looks_like(path / name):
            raise CheckpointError(
                f"{path / name} is refused: a checkpoint holds no pickles, and it is not in the manifest",
                expected="the files that save wrote",
                remedy="find out who put it there; remove it if the rest is trusted",
            )
    for name, record in manifest.files.items():
        _check_file(path / name, record.size_bytes, record.sha256, root)


def _check_file(path: Path, size_bytes: int, sha256: str, root: Path | None) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be used: it is missing", expected=f"{size_bytes} bytes", remedy=_REMEDY)
    _check_place(path, root)
    size = path.stat().st_size
    if size != size_bytes:
        what = "it is truncated" if size < size_bytes else "it is too long"
        raise CheckpointError(
            f"{path} cannot be used: {what}{_looks_like(path)}",
            expected=f"{size_bytes} bytes",
            got=f"{size} bytes",
            remedy=_REMEDY,
        )
    got = record_of(path).sha256
    if got != sha256:
        raise CheckpointError(
            f"{path} cannot be used: its content has changed since it was written{_looks_like(path)}",
            expected=f"sha256 {sha256}",
            got=got,
            remedy=_REMEDY,
        )


def _check_places(directory: Path, root: Path | None) -> None:
    """Refuse what leads out of the root, whether the manifest names it or not, before any of it is opened."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.is_symlink() and path.exists():
                _check_place(path, root)


def _check_place(path: Path, root: Path | None) -> None:
    if root is not None:
        check_inside(path, root, f"The file {path.name} of a checkpoint")


def _looks_like(path: Path) -> str:
    """Say so if a file's first bytes are a pickle's; empty otherwise."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        beginning = file.read(4)
    return ", it looks like a pickle" if beginning.startswith(_PICKLE_BEGINNINGS) else ""
