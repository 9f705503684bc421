"""What is well-formed in entries that save and load checkpoints. Whether files are there is for others to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gradwire_protocol.checkpoint.root import check_checkpoint_path, is_token
from gradwire_protocol.errors import FrameError
from gradwire_protocol.frames import MAXIMUM_VALUE_BYTES
from gradwire_protocol.v1 import run_pb2

_HASH_DIGITS = frozenset("0123456789abcdef")
# Not the name of a tensor in a safetensors file.
_RESERVED = "__metadata__"


def check_save(save: run_pb2.SaveState) -> None:
    """SettingsError or FrameError unless a SaveState entry is well-formed."""
    check_checkpoint_path(save.directory)
    if not is_token(save.token):
        raise FrameError("A checkpoint has a wrong token", expected="the one that BeginSave gave", got=save.token[:80])
    _check_names(save.keys, save.kept)
    _check_each([*save.tied, *save.tied.values()])


def check_stored(stored: run_pb2.StoredState) -> None:
    """SettingsError or FrameError unless what a LoadState entry says of a checkpoint is well-formed."""
    check_checkpoint_path(stored.directory)
    if len(stored.manifest_sha256) != 64 or not _HASH_DIGITS.issuperset(stored.manifest_sha256):
        raise FrameError(
            "A checkpoint has no hash of its manifest",
            expected="64 hexadecimal digits",
            got=stored.manifest_sha256[:80],
        )
    _check_names(stored.keys, stored.kept)


def _check_names(keys: Mapping[str, str], kept: Iterable[str]) -> None:
    names = [name for name in keys.values() if name]
    names += kept
    _check_each(names)
    if len(set(names)) < len(names):
        raise FrameError("Two tensors have the same name in a checkpoint", expected="unique names")


def _check_each(names: Iterable[str]) -> None:
    for name in names:
        if not name.isprintable() or not 1 <= len(name.encode()) <= MAXIMUM_VALUE_BYTES or name == _RESERVED:
            raise FrameError(
                "A tensor has a wrong name in a checkpoint",
                expected=f"1 to {MAXIMUM_VALUE_BYTES} bytes that can be shown",
                got=ascii(name[:80]),
            )
