"""Makes a directory appear whole: filled under a temporary name, synced, then renamed. Knows nothing of its contents.

A kill at any moment leaves the old directory, or the new one, and at most something beside it under a temporary name,
which the next writer of the same path removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CURRENT_DIRECTORY = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE
# The file system, or the system, cannot exchange two names.
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
# The file system cannot lock a directory (NFS).
_CANNOT_LOCK = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
# Where nothing is locked, what nobody has touched for so long is abandoned.
_ABANDONED_SECONDS = 24 * 3600.0


class Replacement:
    """A new directory beside `path`, to be filled and then put in its place, or given up. For one thread at a time.

    token: part of its temporary name (`partial_path`). OSError where it cannot be made.
    """

    def __init__(self, path: Path, token: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        settle(path)
        _remove_abandoned(path)
        self.path = path
        self.directory = partial_path(path, token or uuid.uuid4().hex[:12])
        self.directory.mkdir()
        self._lock: int | None = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Held by the writer as long as it lives: what nobody locks is abandoned.
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                self.close()
                raise

    def commit(self) -> None:
        """Put it in the place of `path`, which is replaced. OSError leaves that as it was; `close` in any case."""
        _sync(self.directory)
        if self.path.exists():
            _replace(self.directory, self.path)
        else:
            self.directory.rename(self.path)
        _sync(self.path.parent)

    def close(self) -> None:
        """Remove what is left under the temporary name: the old directory, or nothing, or what was written in vain.

        Idempotent.
        """
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a new empty directory; when the block ends well it takes the place of `path`, otherwise it goes."""
    replacement = Replacement(path)
    try:
        yield replacement.directory
        replacement.commit()
    finally:
        replacement.close()


def partial_path(path: Path, token: str) -> Path:
    """Return the temporary name beside a path, for a writer's token."""
    return path.parent / f".{path.name}.{token}.partial"


def settle(path: Path) -> None:
    """Finish a replacement that was killed between its two renames, where names cannot be exchanged at once."""
    previous = _previous(path)
    if not path.exists() and previous.exists():
        previous.rename(path)


def remove(path: Path) -> None:
    """Remove a directory, so that no part of it is ever seen under its name."""
    hidden = partial_path(path, uuid.uuid4().hex[:12])
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
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its writer has just finished
            continue
        except NotADirectoryError:  # not what a writer makes
            continue
        try:
            if _is_abandoned(descriptor):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def _is_abandoned(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # its writer lives
        return False
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        return time.time() - os.fstat(descriptor).st_mtime > _ABANDONED_SECONDS
    return True
