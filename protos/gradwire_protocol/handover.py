"""Hands a file descriptor to another process of the same user on the same host, over a unix socket.

The socket has a name in a private directory only while it is needed: who cannot see the directory (another host,
another container) cannot find it. Both sides check each other's user, and the taker says a ticket that it was told in
another way. What the descriptor is of is shared_block.py's.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import select
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from gradwire_protocol.shared_block import TICKET_BYTES, BlockError

_NAME = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = "."  # begins the name of a socket that does not listen yet
_UNFINISHED_SECONDS = 60.0
_PEER_SECONDS = 2.0
_POLL_MILLISECONDS = 10
_INTEGER = struct.Struct("i")
_CREDENTIALS = struct.Struct("3i")  # process, user, group


def default_directory() -> Path:
    """Return where servers of one host look for each other, if nothing else is said."""
    return Path(tempfile.gettempdir())


class Directory:
    """The private directory for sockets, below one that all who share memory can see. BlockError if it is not ours.

    A context manager. Names are resolved below the open directory, whatever the length of its path: a socket's own
    path may have 107 bytes only.
    """

    def __init__(self, parent: Path) -> None:
        user = os.geteuid()
        path = parent / f"gradwire-shared-{user}"
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
            self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise BlockError("not-allowed", f"the directory for shared memory cannot be used: {error}") from error
        found = os.fstat(self.descriptor)
        if found.st_uid != user or stat.S_IMODE(found.st_mode) & 0o077:
            os.close(self.descriptor)
            raise BlockError("not-allowed", f"{path} is not private: it must be user {user}'s, with mode 700")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def address(self, name: str) -> str:
        return f"/proc/self/fd/{self.descriptor}/{name}"

    def sweep(self) -> int:
        """Remove the sockets that nobody listens on any more: their processes were killed. Return how many."""
        removed = 0
        for name in os.listdir(self.descriptor):
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
                if stat.S_ISSOCK(found.st_mode) and self._is_abandoned(name, time.time() - found.st_mtime):
                    os.unlink(name, dir_fd=self.descriptor)
                    removed += 1
        return removed

    def _is_abandoned(self, name: str, age_seconds: float) -> bool:
        if name.startswith(_UNFINISHED):
            return age_seconds > _UNFINISHED_SECONDS
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
            attempt.settimeout(_PEER_SECONDS)
            try:
                attempt.connect(self.address(name))
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
        return False


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user


class Handover:
    """The giving side: a socket with a fresh `name`, until the end of the `with` block. BlockError if it cannot be."""

    def __init__(self, parent: Path) -> None:
        self.name = secrets.token_hex(16)
        self._directory = Directory(parent)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Under its name it listens from the start: otherwise `sweep` could take it for abandoned.
            unfinished = _UNFINISHED + self.name
            self._socket.bind(self._directory.address(unfinished))
            self._socket.listen()
            directory = self._directory.descriptor
            os.rename(unfinished, self.name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            self._close()
            raise BlockError("failed", f"no socket could be made to hand memory over: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def serve(self, ticket: bytes, descriptor: Callable[[], int], is_over: Callable[[], bool]) -> bool:
        """Give the descriptor to the first who says the ticket, and return True; False if `is_over` comes first.

        `descriptor` is called only then, and closed here.
        """
        # Not select: it takes no descriptor above 1,023, and a server may have more connections than that.
        waits = select.poll()
        waits.register(self._socket, select.POLLIN)
        while not is_over():
            if not waits.poll(_POLL_MILLISECONDS):
                continue
            connection, _ = self._socket.accept()
            with connection:
                # Whoever sweeps connects too, and says nothing.
                if _user_of(connection) == os.geteuid() and hmac.compare_digest(_read_ticket(connection), ticket):
                    given = descriptor()
                    try:
                        socket.send_fds(connection, [b"\0"], [given])
                    except OSError:
                        return False
                    finally:
                        os.close(given)
                    return True
        return False

    def _close(self) -> None:
        self._socket.close()
        for name in (self.name, _UNFINISHED + self.name):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory.descriptor)
        os.close(self._directory.descriptor)


def _read_ticket(connection: socket.socket) -> bytes:
    connection.settimeout(_PEER_SECONDS)
    said = b""
    with contextlib.suppress(OSError):
        while len(said) < TICKET_BYTES and (part := connection.recv(TICKET_BYTES - len(said))):
            said += part
    return said


def take_over(parent: Path, name: str, ticket: bytes, timeout_seconds: float) -> int:
    """Return the file descriptor that a `Handover` gives under `name` to who knows the ticket. BlockError."""
    if not _NAME.fullmatch(name):  # nothing else may be reached from here
        raise BlockError("failed", f"not the name of a socket that hands memory over: {name[:64]!r}")
    with Directory(parent) as directory, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(directory.address(name))
        except FileNotFoundError as error:
            raise BlockError("other-host", "its socket is not here: another host, or another file system") from error
        except OSError as error:
            raise BlockError("failed", f"its socket cannot be reached: {error}") from error
        if _user_of(connection) != os.geteuid():
            raise BlockError("not-allowed", f"its socket is another user's: {_user_of(connection)}")
        try:
            connection.sendall(ticket)
            # Not socket.recv_fds: it forgets its flags, and the descriptor would go to every child.
            _, extra, _, _ = connection.recvmsg(1, socket.CMSG_LEN(_INTEGER.size), socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise BlockError("failed", f"the memory was not handed over: {error}") from error
        for level, kind, data in extra:
            if (level, kind, len(data)) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, _INTEGER.size):
                descriptor: int = _INTEGER.unpack(data)[0]
                return descriptor
        raise BlockError("failed", "the memory was not handed over: the connection was closed")
