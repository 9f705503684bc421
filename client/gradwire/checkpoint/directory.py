"""Makes a directory appear whole: filled under a temporary name, synced, then renamed. Knows nothing of its contents.

A kill at any moment leaves the old directory, or the new one, and at most something beside it under a temporary name,
which the next writer of the same path removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CURRENT_DIRECTORY = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE
# The file system, or the system, cannot exchange two names.
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a new empty directory; when the block ends well it takes the place of `path`, otherwise it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    _remove_abandoned(path)
    stage = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    stage.mkdir()
    lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Held by the writer as long as it lives: what nobody locks is abandoned.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield stage
        _sync(stage)
        if path.exists():
            _replace(stage, path)
        else:
            stage.rename(path)
        _sync(path.parent)
    finally:
        # By now it is the old directory, or nothing; or else what was written in vain.
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


def settle(path: Path) -> None:
    """Finish a replacement that was killed between its two renames, where names cannot be exchanged at once."""
    previous = _previous(path)
    if not path.exists() and previous.exists():
        previous.rename(path)


def remove(path: Path) -> None:
    """Remove a directory, so that no part of it is ever seen under its name."""
    hidden = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make the names in a directory last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _replace(stage: Path, path: Path) -> None:
    try:
        _exchange(stage, path)
    except OSError as error:
        if error.errno not in _CANNOT_EXCHANGE:
            raise
    else:
        return  # the stage's name has the old directory now
    previous = _previous(path)
    shutil.rmtree(previous, ignore_errors=True)
    path.rename(previous)
    stage.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Exchange two names in one step (Linux, renameat2). OSError, ENOSYS where there is no such call."""
    call: Callable[..., int] | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_CURRENT_DIRECTORY, os.fsencode(first), _CURRENT_DIRECTORY, os.fsencode(second), _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


def _remove_abandoned(path: Path) -> None:
    for left in path.parent.glob(f".{path.name}.*.partial"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its writer has just finished
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:  # its writer lives
            continue
        finally:
            os.close(descriptor)
