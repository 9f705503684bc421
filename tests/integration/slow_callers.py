"""Opens very many connections to a service and keeps them, each slow in its own way: run as a process of its own.

`slow_callers.py HOST PORT COUNT KIND…` prints how many it has opened, and goes when its standard input ends. It needs
a descriptor for each.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A client's first bytes in HTTP/2, and its settings, which change nothing.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_BYTE_SECONDS = 1.0


def _hello() -> bytes:
    """A whole TLS ClientHello."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="somewhere")
    with contextlib.suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


# What each kind sends at once, and what it sends after that, a byte each second.
_KINDS: dict[str, tuple[bytes, bytes]] = {
    "silent": (b"", b""),
    "a byte at a time": (b"", _PREFACE),
    "half a hello": (_hello()[:200], b""),
    "a hello, no certificate": (_hello(), b""),
    "a hello, a byte at a time": (b"", _hello()),
    "a preface, no request": (_PREFACE + _SETTINGS, b""),
}
# Those that are not seen through at once: bytes that are no HTTP/2, or no TLS, end a connection.
PLAINTEXT = ("silent", "a byte at a time", "a preface, no request")
TLS = ("silent", "half a hello", "a hello, no certificate", "a hello, a byte at a time")


@contextmanager
def slow_callers(address: str, count: int, kinds: tuple[str, ...]) -> Iterator[Callable[[], None]]:
    """Open `count` connections to HOST:PORT, and keep them, as far as it lets them, until the block ends.

    Yields what waits until all are open.
    """
    host, _, port = address.rpartition(":")
    command = [sys.executable, __file__, host, port, str(count), *kinds]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    said = process.stdout

    def wait_open() -> None:
        assert said.readline() == f"{count}\n"

    try:
        yield wait_open
    finally:
        process.stdin.close()
        assert process.wait(30) == 0
        process.stdout.close()


def _main(host: str, port: str, count: str, *kinds: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    dribbling: list[tuple[socket.socket, bytes]] = []
    opened: list[socket.socket] = []
    for index in range(int(count)):
        at_once, later = _KINDS[kinds[index % len(kinds)]]
        # The queue of those who wait to be accepted may be full for a moment.
        connection = socket.create_connection((host, int(port)), timeout=30)
        connection.setblocking(False)
        opened.append(connection)
        with contextlib.suppress(OSError):  # closed at once: there are too many
            connection.sendall(at_once)
        if later:
            dribbling.append((connection, later))
    print(len(opened), flush=True)
    sent = 0
    while not select.select([sys.stdin], [], [], _BYTE_SECONDS)[0]:
        for connection, later in dribbling:
            with contextlib.suppress(OSError):
                connection.send(later[sent : sent + 1])
        sent += 1
    # Without a farewell for each: they go all at once.
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
