"""A channel whose calls begin on a connection with the certificate that is in the files then.

gRPC's own channels keep the credentials that they were made with, also for connecting again: they would fail for ever
once the certificate has ended. Calls in progress stay where they are: a connection outlives its certificate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from gradwire_protocol.credentials import Loaded, OwnCertificate


@dataclass
class _Connection:
    """A channel of gRPC's, the credentials that it was made with, and how many calls are on it."""

    channel: Any
    loaded: Loaded
    calls: int = 0


class RotatingChannel(grpc.Channel):  # type: ignore[misc]  # grpcio has no type information
    """A grpc.Channel over channels that `open_with` makes. Thread-safe."""

    def __init__(self, certificate: OwnCertificate, open_with: Callable[[Loaded], Any]) -> None:
        self._certificate = certificate
        self._open_with = open_with
        self._lock = threading.Lock()
        loaded = certificate.current()
        self._connection = _Connection(open_with(loaded), loaded)
        # Those with older certificates, until their calls have ended.
        self._former: list[_Connection] = []
        self._closed = False

    def unary_unary(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.unary_unary(*arguments, **named), responds_once=True)

    def unary_stream(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.unary_stream(*arguments, **named), responds_once=False)

    def stream_unary(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.stream_unary(*arguments, **named), responds_once=True)

    def stream_stream(self, *arguments: Any, **named: Any) -> Any:
        return _Method(self, lambda channel: channel.stream_stream(*arguments, **named), responds_once=False)

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._connection.channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        for connection in (self._connection, *self._former):
            connection.channel.unsubscribe(callback)

    def close(self) -> None:
        """End all calls. Idempotent."""
        with self._lock:
            self._closed = True
            connections, self._former = [self._connection, *self._former], []
        for connection in connections:
            connection.channel.close()

    def __enter__(self) -> RotatingChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> _Connection:
        """Return the connection for one more call; `give_back` when that has ended."""
        loaded = self._certificate.current()
        with self._lock:
            if loaded is not self._connection.loaded and not self._closed:
                self._former.append(self._connection)
                self._connection = _Connection(self._open_with(loaded), loaded)
            self._connection.calls += 1
            idle = [connection for connection in self._former if not connection.calls]
            self._former = [connection for connection in self._former if connection.calls]
            taken = self._connection
        for connection in idle:
            connection.channel.close()
        return taken

    def give_back(self, connection: _Connection) -> None:
        # Closed by the next `take`: this may be a thread of the channel's own.
        with self._lock:
            connection.calls -= 1


class _Method:
    """What a channel returns for a method: a callable, which also has `future` and `with_call` if it responds once."""

    def __init__(self, owner: RotatingChannel, make: Callable[[Any], Any], *, responds_once: bool) -> None:
        self._owner = owner
        self._make = make
        self._responds_once = responds_once
        # The one of the connection that was used last.
        self._made: tuple[_Connection, Any] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._responds_once:
            return self._wait(lambda method: method(*arguments, **named))
        return self._begin(lambda method: method(*arguments, **named))

    def with_call(self, *arguments: Any, **named: Any) -> Any:
        return self._wait(lambda method: method.with_call(*arguments, **named))

    def future(self, *arguments: Any, **named: Any) -> Any:
        return self._begin(lambda method: method.future(*arguments, **named))

    def _wait(self, call: Callable[[Any], Any]) -> Any:
        connection = self._owner.take()
        try:
            return call(self._on(connection))
        finally:
            self._owner.give_back(connection)

    def _begin(self, call: Callable[[Any], Any]) -> Any:
        connection = self._owner.take()
        try:
            begun = call(self._on(connection))
        except BaseException:
            self._owner.give_back(connection)
            raise
        ended = partial(self._owner.give_back, connection)
        if not begun.add_callback(ended):
            ended()
        return begun

    def _on(self, connection: _Connection) -> Any:
        made = self._made
        if made is None or made[0] is not connection:
            made = self._made = (connection, self._make(connection.channel))
        return made[1]
