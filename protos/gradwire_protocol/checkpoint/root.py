"""The directory below which a service reads and writes checkpoints (--checkpoint-root): which paths of it may be used.

One directory for the coordinator and all stage servers: of a shared file system, or of one host.
"""

from __future__ import annotations

import re
from pathlib import Path

from gradwire_protocol.checkpoint.directory import partial_path
from gradwire_protocol.checkpoint.manifest import FILE_NAME
from gradwire_protocol.errors import CheckpointError, SettingsError
from gradwire_protocol.relative_paths import check_inside, check_relative

# Of the temporary directory of a checkpoint that several servers write.
_TOKEN = re.compile(r"[a-z0-9-]{1,64}")


def check_checkpoint_path(directory: str) -> None:
    """SettingsError unless it names a directory below the root, and not the root itself."""
    check_relative(directory, "The directory of a checkpoint")
    if directory == ".":
        raise SettingsError(
            "The root of checkpoints cannot be one itself", expected="a name below it", got=repr(directory)
        )


def is_token(text: str) -> bool:
    """Whether it can be the token of a temporary directory."""
    return _TOKEN.fullmatch(text) is not None


def check_target(path: Path) -> None:
    """Refuse to put a checkpoint in the place of something else."""
    try:
        occupied = path.is_symlink() or (
            path.exists() and not (path / FILE_NAME).is_file() and not (path.is_dir() and not any(path.iterdir()))
        )
    except OSError as error:
        raise CheckpointError(f"A checkpoint cannot be written to {path}", got=str(error)) from error
    if occupied:
        raise CheckpointError(
            f"{path} is not a checkpoint, and is not written over",
            expected="a path that is free, or a checkpoint's",
            remedy="give another path",
        )


class CheckpointRoot:
    """One service's root; path None: it was started without. service: what errors call it. Errors are typed."""

    def __init__(self, path: Path | None, service: str) -> None:
        self._path = path
        self._service = service

    def path(self) -> Path:
        """Return the root; SettingsError if there is none."""
        if self._path is None:
            raise SettingsError(
                f"{self._service} has no directory of checkpoints",
                expected="--checkpoint-root",
                got="a checkpoint to be written or read by servers",
                remedy="start the coordinator and every stage server with --checkpoint-root DIRECTORY, one for all, "
                'or let the client do it: storage="client"',
            )
        return self._path

    def target(self, directory: str) -> Path:
        """Return the path that a checkpoint may be written to; CheckpointError if something else is there."""
        check_checkpoint_path(directory)
        root = self.path()
        target = root / directory
        # What is there already of the way to it must not lead elsewhere.
        nearest = target.parent
        while not nearest.exists() and not nearest.is_symlink():
            nearest = nearest.parent
        check_inside(nearest, root, f"The directory {directory!r} of a checkpoint")
        check_target(target)
        return target

    def stored(self, directory: str) -> Path:
        """Return the path of a checkpoint that is to be read; CheckpointError if there is none."""
        check_checkpoint_path(directory)
        root = self.path()
        path = root / directory
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(f"There is no checkpoint at {path}", expected="a directory that save made")
        check_inside(path, root, f"The directory {directory!r} of a checkpoint")
        return path

    def partial(self, directory: str, token: str) -> Path:
        """Return the directory that a checkpoint is written into, which the coordinator has made."""
        check_checkpoint_path(directory)
        root = self.path()
        path = partial_path(root / directory, token)
        if not path.is_dir():
            raise SettingsError(
                f"{self._service} does not see the directory that the coordinator has made for a checkpoint",
                expected=str(path),
                got="nothing there",
                remedy="start the coordinator and every stage server with the same --checkpoint-root",
            )
        return check_inside(path, root, f"The directory {directory!r} of a checkpoint")
