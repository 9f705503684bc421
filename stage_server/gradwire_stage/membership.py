"""Keeps this server known to the coordinator: registers, heartbeats, registers again when it was forgotten.

A coordinator that does not answer is tried for ever, at growing intervals: it may be restarted at any time.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from gradwire_protocol.errors import Aborted, GradwireError, RunNotFound, from_rpc_error
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc, stage_pb2

_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 5.0
_CALL_SECONDS = 5.0
# A run does not outlive its coordinator's silence by more than this, and one call.
SILENCE_SECONDS = 20.0
# Bounds for what a coordinator asks for.
_SHORTEST_HEARTBEAT_SECONDS = 0.05
_LONGEST_HEARTBEAT_SECONDS = 60.0

_log = structlog.get_logger(__name__)


class Membership:
    """A thread that keeps one server registered, from `start` to `stop`.

    `activity` tells what the server is doing, for each heartbeat. `on_orphaned` is called when no coordinator stands
    behind a run here: when none of them has been answered for `silence_seconds`, since it is frozen or cut off although
    connections to it may stand; and when it does not know this server.
    """

    def __init__(
        self,
        channel: Any,
        coordinator: str,
        registration: coordinator_pb2.RegisterRequest,
        activity: Callable[[], stage_pb2.Activity],
        *,
        on_orphaned: Callable[[str], None] = lambda reason: None,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
        self._target = f"coordinator at {coordinator}"
        self._registration = registration
        self._activity = activity
        self._on_orphaned = on_orphaned
        self._silence_seconds = silence_seconds
        self._stop = threading.Event()
        # Set when something is due before the next heartbeat.
        self._wake = threading.Event()
        self._leaves_at: float | None = None  # time.monotonic()
        self._perhaps_known = False  # a call may have arrived although its reply has not
        self._in_flight: Any = None
        self._thread = threading.Thread(target=self._main, name="membership", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def announce_leave(self, within_seconds: float) -> None:
        """Tell the coordinator that this server leaves when its run has ended, and within this time."""
        self._leaves_at = time.monotonic() + within_seconds
        self._wake.set()

    def stop(self) -> None:
        """End the thread, and leave the coordinator in good order if it answers."""
        self._stop.set()
        self._wake.set()
        in_flight = self._in_flight
        if in_flight is not None:
            in_flight.cancel()
        self._thread.join(2 * _CALL_SECONDS)
        if not self._perhaps_known:
            return
        request = coordinator_pb2.DeregisterRequest(server=self._registration.server)
        try:
            self._call(self._stub.Deregister, request, timeout_seconds=1.0)
        except GradwireError as error:
            _log.warning("could not deregister", error=str(error))

    def _main(self) -> None:
        while not self._stop.is_set():
            interval = self._register()
            if interval is None:
                return
            self._heartbeat(interval)

    def _register(self) -> float | None:
        """Register, however long it takes; return the seconds between heartbeats, None when stopped."""
        delay = _FIRST_RETRY_SECONDS
        while not self._stop.is_set():
            self._perhaps_known = True
            try:
                reply = self._call(self._stub.Register, self._registration)
            except GradwireError as error:
                if self._stop.is_set():
                    return None
                _log.warning("cannot register, trying again", error=str(error), seconds=round(delay, 2))
                # Jitter: servers that lost one coordinator do not come back all at once.
                self._stop.wait(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, _LONGEST_RETRY_SECONDS)
                continue
            _log.info("registered", coordinator=self._target, server=self._registration.server)
            asked: float = reply.heartbeat_seconds
            return min(max(asked, _SHORTEST_HEARTBEAT_SECONDS), _LONGEST_HEARTBEAT_SECONDS)
        return None

    def _heartbeat(self, interval_seconds: float) -> None:
        """Send heartbeats until the coordinator does not know this server any more, or the end."""
        silent_seconds = 0.0
        while True:
            self._wake.wait(interval_seconds)
            self._wake.clear()
            if self._stop.is_set():
                return
            sent_at = time.monotonic()
            request = coordinator_pb2.HeartbeatRequest(server=self._registration.server, activity=self._activity())
            if self._leaves_at is not None:
                request.leaves_in_seconds = max(0.0, self._leaves_at - sent_at)
            try:
                self._call(self._stub.Heartbeat, request)
            except RunNotFound:
                self._perhaps_known = False
                _log.info("the coordinator has forgotten this server", coordinator=self._target)
                # It has been started again, or has taken this server for lost: no run here is one of its.
                self._on_orphaned(f"the {self._target} does not know this server any more")
                return
            except GradwireError as error:
                if not silent_seconds and not self._stop.is_set():
                    _log.warning("a heartbeat failed", error=str(error))
                # Time in which this process was stopped itself does not count.
                silent_seconds += interval_seconds + min(time.monotonic() - sent_at, _CALL_SECONDS)
                if silent_seconds >= self._silence_seconds:
                    self._on_orphaned(f"the {self._target} has not answered for {silent_seconds:.0f} s")
            else:
                silent_seconds = 0.0

    def _call(self, method: Any, request: Any, timeout_seconds: float = _CALL_SECONDS) -> Any:
        # As a future, so that `stop` can end it.
        call = self._in_flight = method.future(request, timeout=timeout_seconds)
        try:
            return call.result()
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=self._target) from error
        except grpc.FutureCancelledError as error:
            raise Aborted(f"The call to the {self._target} was cut off") from error
