"""Serves /metrics over plain HTTP, to whoever asks, at a bounded cost.

Each connection has a thread, so there are few of them, each for a short time, and a new one takes the place of the
oldest: whoever holds connections open keeps no scrape out.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

_MAXIMUM_CONNECTIONS = 16
# From its beginning to the end of the answer.
_CONNECTION_SECONDS = 10.0
# For the thread of a connection that was ended.
_END_SECONDS = 1.0
# How often is looked whether a connection, or the page, is to end.
_LOOK_SECONDS = 0.1


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # the parameter's name is the base class's
        """A scrape is no event."""


class MetricsPage(ThreadingMixIn, WSGIServer):
    """Listens on HOST and port (0: any free one), which `server_address` tells; OSError. `close` ends it."""

    daemon_threads = True
    # Further ones must call again, a second later.
    request_queue_size = 128

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._room = threading.Semaphore(_MAXIMUM_CONNECTIONS)
        self._lock = threading.Lock()
        self._began: dict[socket.socket, float] = {}  # time.monotonic() by connection, the oldest first
        super().__init__((host, port), _Handler)
        self.set_app(make_wsgi_app(registry))
        threading.Thread(target=self.serve_forever, args=(_LOOK_SECONDS,), name="metrics", daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._end(time.monotonic())

    def server_bind(self) -> None:
        """Bind without asking for the host's full name, which takes seconds where no name server answers."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            with self._lock:
                oldest = next(iter(self._began.values()), 0.0)
            self._end(oldest)
            if not self._room.acquire(timeout=_END_SECONDS):
                self.shutdown_request(request)
                return
        with self._lock:
            self._began[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._began[request]
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The other side has gone, or was cut off: the page's own errors are answered with status 500."""

    def service_actions(self) -> None:
        """End what takes too long; called again and again."""
        self._end(time.monotonic() - _CONNECTION_SECONDS)

    def _end(self, begun: float) -> None:
        """Cut off the connections that have begun by then; their threads end with them."""
        with self._lock:
            for connection, began in self._began.items():
                if began <= begun:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
