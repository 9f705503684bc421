"""The frame that every service stands in: port, health, errors, metrics, signals, parent watch.

A service's own main builds its servicers between `Service(...)` and `start()`, and ends in `wait()` and `stop()`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from gradwire_protocol.channels import SERVER_OPTIONS, bind, parse_address
from gradwire_protocol.connection_limit import connection_options
from gradwire_protocol.errors import ErrorInterceptor, SettingsError
from gradwire_protocol.metrics_page import MetricsPage
from gradwire_protocol.peer_roles import RoleInterceptor
from gradwire_protocol.roles import Role
from gradwire_protocol.stream_limit import WORKERS
from gradwire_protocol.tls_files import TlsFiles

if TYPE_CHECKING:
    from gradwire_protocol.certificate_watch import CertificateWatch

_log = structlog.get_logger(__name__)
# After the parent is gone, or main is done, the process ends within this time, whatever hangs.
_EXIT_SECONDS = 10.0
# How often a service that was asked to stop looks whether what is in progress is done.
_LOOK_SECONDS = 0.05
# Set when this process's parent is gone, or wants it gone: nobody is left to finish anything for.
_parent_gone = threading.Event()


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What every service can be told."""

    listen: str = "127.0.0.1:0"
    # HOST:PORT that others dial; empty: the bound address.
    advertise: str = ""
    # HOST:PORT of /metrics; empty: none.
    metrics_listen: str = "127.0.0.1:0"
    tls: TlsFiles | None = None
    # The role that its certificate must have; None: any.
    role: Role | None = None
    insecure: bool = False
    # File descriptor that gets one JSON line {"address", "metrics_address"} when the service is ready.
    ready_fd: int | None = None


def watch_stdin() -> None:
    """End this process when standard input ends: its parent holds the other side, and has died or wants it gone.

    Call it first in main: it also works while the rest is still being imported.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        _parent_gone.set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_EXIT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


class _Capture:
    """Stands in for a server, to get at the handlers that generated code registers."""

    def __init__(self) -> None:
        self.service = ""
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """Generated code adds the same handlers this way too, for old servers."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.service, self.handlers = service, handlers


def register_with_raw_streams(
    add: Callable[[Any, Any], None],
    servicer: Any,
    server: Any,
    *,
    raw_requests: Iterable[str] = (),
    raw_responses: Iterable[str] = (),
) -> None:
    """Register a servicer some of whose streaming methods take, or give, messages as bytes.

    `add` is the generated `add_…Servicer_to_server`. raw_requests: stream to stream. raw_responses: call to stream.
    """
    capture = _Capture()
    add(servicer, capture)
    handlers = capture.handlers
    for name in raw_requests:
        handlers[name] = grpc.stream_stream_rpc_method_handler(
            handlers[name].stream_stream,
            request_deserializer=None,
            response_serializer=handlers[name].response_serializer,
        )
    for name in raw_responses:
        handlers[name] = grpc.unary_stream_rpc_method_handler(
            handlers[name].unary_stream,
            request_deserializer=handlers[name].request_deserializer,
            response_serializer=None,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(capture.service, handlers),))
    server.add_registered_method_handlers(capture.service, handlers)


def configure_logging() -> None:
    """Log to standard error, one line an event. Tracebacks show no local variables: they can hold whole tensors."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class Service:
    """A gRPC server with health service, error translation, metrics and an orderly end.

    `address` is what others dial, with its real port, known from the start; calls are taken after `start()`.
    """

    def __init__(self, name: str, settings: ServiceSettings) -> None:
        self.name = name
        self.registry = CollectorRegistry()
        self._settings = settings
        self._stop = threading.Event()
        self._at_once = threading.Event()
        self._metrics_page: MetricsPage | None = None
        self.metrics_address = ""
        self._pool = futures.ThreadPoolExecutor(WORKERS, thread_name_prefix=name)
        self._certificate_watch = _watch_certificate(settings, self.registry)
        interceptors = (ErrorInterceptor(),) if settings.tls is None else (ErrorInterceptor(), RoleInterceptor())
        self.server = grpc.server(self._pool, interceptors=interceptors, options=SERVER_OPTIONS + connection_options())
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        bound = bind(self.server, settings.listen, settings.tls, insecure=settings.insecure)
        if settings.advertise:
            parse_address(settings.advertise)
        elif parse_address(bound)[0] in ("0.0.0.0", "::"):
            raise SettingsError(
                f"{bound} is not an address that others can dial",
                expected="--advertise HOST:PORT, as peers reach this machine",
                got="a listening address for all interfaces and no --advertise",
                remedy="add --advertise",
            )
        self.address = settings.advertise or bound

    def start(self) -> None:
        """Take calls, serve metrics, report ready."""
        if self._settings.metrics_listen:
            host, port = parse_address(self._settings.metrics_listen)
            try:
                self._metrics_page = MetricsPage(host, port, self.registry)
            except OSError as error:
                raise SettingsError(
                    f"Cannot serve metrics on {self._settings.metrics_listen}",
                    got=str(error),
                    remedy="choose another port, or port 0",
                ) from error
            shown = f"[{host}]" if ":" in host else host
            self.metrics_address = f"{shown}:{self._metrics_page.server_port}"
        if self._certificate_watch is not None:
            self._certificate_watch.start()
        self.server.start()
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        _log.info("listening", service=self.name, address=self.address, metrics=self.metrics_address)

    def report_ready(self) -> None:
        """Tell the process that started this one the addresses, if it asked (`ready_fd`)."""
        if self._settings.ready_fd is not None:
            with os.fdopen(self._settings.ready_fd, "w") as ready:
                ready.write(json.dumps({"address": self.address, "metrics_address": self.metrics_address}) + "\n")

    def install_signal_handlers(self) -> None:
        """SIGTERM asks for an orderly stop; a second one, or SIGINT, for one at once. Main thread only."""

        def ask(number: int, frame: FrameType | None) -> None:
            at_once = number == signal.SIGINT or _parent_gone.is_set()
            # Not here: this may have come between two lines of the wait for the same event, which holds its lock.
            threading.Thread(target=self.request_stop, kwargs={"at_once": at_once}, daemon=True).start()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask)

    def request_stop(self, *, at_once: bool = False) -> None:
        """Have `wait` return. at_once, or asked a second time: `finish` too."""
        if at_once or self._stop.is_set():
            self._at_once.set()
        self._stop.set()

    def wait(self) -> None:
        """Return when a stop was asked for."""
        self._stop.wait()

    def finish(self, busy: Callable[[], bool], seconds: float) -> bool:
        """After `wait`, give what is in progress so long to come to its end; return whether it has.

        Calls are still taken meanwhile, but health checks say that the service does not serve.
        """
        self._health.enter_graceful_shutdown()
        deadline = time.monotonic() + seconds
        while busy():
            if time.monotonic() > deadline or self._at_once.wait(_LOOK_SECONDS):
                return False
        return True

    def stop(self, grace_seconds: float = 1.0) -> None:
        """Refuse new calls, give those in progress the grace, then cancel them. Idempotent."""
        self._stop.set()
        self._health.enter_graceful_shutdown()
        self.server.stop(grace_seconds).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._certificate_watch is not None:
            self._certificate_watch.stop()
        if self._metrics_page is not None:
            self._metrics_page.close()
            self._metrics_page = None


def _watch_certificate(settings: ServiceSettings, registry: CollectorRegistry) -> CertificateWatch | None:
    """Return the watch over a service's certificate, None for plaintext; SettingsError for one of another role."""
    if settings.tls is None:
        return None
    # Import cryptography, which plaintext does not need.
    from gradwire_protocol.certificate_watch import CertificateWatch
    from gradwire_protocol.credentials import OwnCertificate

    certificate = OwnCertificate(settings.tls)
    info = certificate.current().info
    if settings.role not in (None, info.role):
        raise SettingsError(
            f"The certificate {settings.tls.certificate} is not one for this service",
            expected=f"the role {settings.role}",
            got=f"the role {info.role}" if info.role is not None else "none of Gradwire's roles",
            remedy=f"issue one with `gradwire certs issue DIR --role {settings.role} …`",
        )
    return CertificateWatch(certificate, registry)


def exit_in_time() -> None:
    """End the process even if a thread of some library does not: call when main has nothing left to do."""
    timer = threading.Timer(_EXIT_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


def host_name() -> str:
    """Return this machine's name, for identifiers that people read."""
    return socket.gethostname().split(".")[0][:32]
