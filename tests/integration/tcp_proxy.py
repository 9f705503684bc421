"""A TCP proxy that does one bad thing to one connection, at a moment that the bytes on it give.

`Fault` says what and when. The connection that carries the bytes waited for is hit; all others pass untouched.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from gradwire_protocol.channels import parse_address
from gradwire_protocol.v1 import tensors_pb2 as pb

_CHUNK_BYTES = 2**16
# Of what went by, so much is looked at together with what comes: a pattern may lie across two chunks.
_TAIL_BYTES = 1024


def has_message(direction: pb.Direction, entry: int) -> Callable[[bytes], bool]:
    """Find the header of a tensor message of generation 1: the fields of its MessageKey, as protobuf writes them."""
    start = re.compile(rb"\x10\x01\x18%c(?:\x20.)?(?:\x2a(.))?" % entry, flags=re.DOTALL)

    def find(data: bytes) -> bool:
        for match in start.finditer(data):
            behind_value = match.end() + (match[1][0] if match[1] else 0)
            if data[behind_value : behind_value + 2] == b"\x30%c" % direction:
                return True
        return False

    return find


def has_bytes(pattern: bytes) -> Callable[[bytes], bool]:
    """Find these very bytes."""
    return lambda data: pattern in data


@dataclass
class Fault:
    """drop: swallow this connection's bytes from now on, and keep it open. delay: hold it up for `seconds`, once.

    cut: reset it. duplicate: replay it on a second connection to the target, from its first byte on. It happens when
    `when` finds what it looks for in what goes by, or when the connection has carried `at_bytes`; `down`: of what the
    target sends.
    """

    kind: str
    when: Callable[[bytes], bool] | None = None
    at_bytes: int | None = None
    down: bool = False
    seconds: float = 0.3
    happened: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def strikes(self, tail: bytes, carried: int, down: bool) -> bool:
        """Whether it is time; true once."""
        if down != self.down:
            return False
        by_bytes = self.at_bytes is not None and carried >= self.at_bytes
        if not by_bytes and not (self.when is not None and self.when(tail)):
            return False
        with self._lock:
            first = not self.happened.is_set()
            self.happened.set()
        return first


class TcpProxy:
    """Listens on loopback, and passes bytes to and from `target`. Use in a `with` block, or `close` it."""

    def __init__(self, target: str) -> None:
        self._target = parse_address(target)
        self.fault: Fault | None = None
        # A slow link: so much passes each way, on each connection. None: as fast as it comes.
        self.bytes_per_second: float | None = None
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        for one in self._sockets:
            _close(one)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                target = socket.create_connection(self._target)
            except OSError:
                continue
            self._sockets += [client, target]
            connection = _Connection(self, client, target, lambda: socket.create_connection(self._target))
            for down in (False, True):
                threading.Thread(target=connection.pump, args=(down,), daemon=True).start()


class _Connection:
    def __init__(
        self, proxy: TcpProxy, client: socket.socket, target: socket.socket, dial: Callable[[], socket.socket]
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._target = target
        self._dial = dial
        self._dropping = False
        self._twin: socket.socket | None = None
        self._sent = bytearray()

    def pump(self, down: bool) -> None:
        source, sink = (self._target, self._client) if down else (self._client, self._target)
        tail, carried = b"", 0
        try:
            while data := source.recv(_CHUNK_BYTES):
                tail, carried = (tail + data)[-_TAIL_BYTES - len(data) :], carried + len(data)
                fault = self._proxy.fault
                if fault is not None and fault.strikes(tail, carried, down):
                    self._strike(fault)
                if self._dropping:
                    continue
                if self._proxy.bytes_per_second is not None:
                    time.sleep(len(data) / self._proxy.bytes_per_second)
                if not down:
                    self._keep(data)
                sink.sendall(data)
        except OSError:
            pass
        if not self._dropping:
            _close(self._client)
            _close(self._target)
        if self._twin is not None:
            _close(self._twin)

    def _strike(self, fault: Fault) -> None:
        match fault.kind:
            case "drop":
                self._dropping = True
            case "delay":
                threading.Event().wait(fault.seconds)
            case "cut":
                for one in (self._client, self._target):
                    # Without a farewell: a reset, and nothing of what is buffered.
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    _close(one)
            case "duplicate":
                self._twin = self._dial()
                self._twin.sendall(self._sent)
                threading.Thread(target=_discard, args=(self._twin,), daemon=True).start()

    def _keep(self, data: bytes) -> None:
        self._sent += data
        if self._twin is not None:
            try:
                self._twin.sendall(data)
            except OSError:
                # The target has refused it.
                _close(self._twin)
                self._twin = None


def _discard(twin: socket.socket) -> None:
    try:
        while twin.recv(_CHUNK_BYTES):
            pass
    except OSError:
        pass


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextmanager
def proxies() -> Iterator[Callable[[str], TcpProxy]]:
    """Yield a function that puts a proxy before an address; all are closed at the end."""
    made: list[TcpProxy] = []

    def before(address: str) -> TcpProxy:
        made.append(TcpProxy(address))
        return made[-1]

    try:
        yield before
    finally:
        for proxy in made:
            proxy.close()
