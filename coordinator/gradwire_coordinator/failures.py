"""Finds the first cause when servers of a run fail, and says it.

When one server fails, the streams of its neighbours break in consequence, and which the coordinator hears of first is
chance. Leaves to others: noticing (`run.py`, `service.py`), and what follows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import structlog

from gradwire_coordinator.server_place import ServerPlace
from gradwire_protocol.errors import (
    Aborted,
    GradwireError,
    InternalError,
    StageFailed,
    StaleGeneration,
    Unreachable,
    from_rpc_error,
    status_of,
)

_log = structlog.get_logger(__name__)

# How long a failure that may be a consequence waits for its cause.
CAUSE_SECONDS = 1.0
_LOST_REMEDY = "see this server's log and memory, start it again, and start the run again from its last saved state"
# What a server reports because another one failed.
_CONSEQUENCES = (Unreachable, Aborted, StageFailed, StaleGeneration)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One server's failure, as the coordinator has it."""

    place: ServerPlace
    server: str
    address: str
    # "during entry 7", "between entries".
    moment: str
    # What the registry last knew of it, in words.
    last_known: str
    # The error that the server itself sent; None: it was lost without a word.
    reported: GradwireError | None = None
    # Of a lost server: what was seen.
    seen: str = ""

    @property
    def is_consequence(self) -> bool:
        """Whether another server's failure may be behind this one."""
        return isinstance(self.reported, _CONSEQUENCES)

    def as_error(self) -> GradwireError:
        """Return the error that the client gets."""
        where = f"{self.place.name.capitalize()} (server {self.server} at {self.address})"
        if self.reported is None:
            return StageFailed(
                f"{where} was lost {self.moment}",
                expected="a server that answers and sends heartbeats",
                got=f"{self.seen}; last known {self.last_known}",
                remedy=_LOST_REMEDY,
            )
        if isinstance(self.reported, (InternalError, *_CONSEQUENCES)):
            return StageFailed(
                f"{where} failed {self.moment}: {self.reported.message}",
                expected=self.reported.expected,
                got="; ".join(filter(None, (self.reported.got, f"last known {self.last_known}"))),
                remedy=self.reported.remedy or _LOST_REMEDY,
            )
        return type(self.reported)(
            f"{where}: {self.reported.message}",
            expected=self.reported.expected,
            got=self.reported.got,
            remedy=self.reported.remedy,
        )


def how_it_ended(failure: grpc.RpcError | GradwireError | None, target: str) -> tuple[GradwireError | None, str]:
    """Return what a server reported as the end of its stream, if anything, and otherwise what was seen of that end.

    failure: of the stream; None: it was closed. target: how errors name the server.
    """
    if failure is None:
        return None, "it closed its stream"
    if isinstance(failure, GradwireError):
        return failure, ""
    reported = _reported(failure, target)
    if reported is None and isinstance(failure, grpc.Call):
        return None, f"its stream broke with {failure.code().name}: {failure.details()}"
    return reported, "its stream broke"


def first_cause(evidence: Sequence[Evidence]) -> Evidence:
    """Return the first that is not a consequence of another; the first of all if there is none."""
    return next((item for item in evidence if not item.is_consequence), evidence[0])


class CauseFinder:
    """Collects evidence until a cause is found, and then calls `found` with it, once. Thread-safe.

    A failure that may be a consequence waits for its cause: until every server has failed, or a second has passed.
    """

    def __init__(self, servers: int, found: Callable[[Evidence], None]) -> None:
        self._servers = servers
        self._found = found
        self._lock = threading.Lock()
        self._evidence: list[Evidence] = []
        self._timer: threading.Timer | None = None
        self._closed = False

    def add(self, evidence: Evidence) -> None:
        """Take in a server's failure. May call `found` on this thread."""
        with self._lock:
            if self._closed:
                return
            self._evidence.append(evidence)
            if evidence.is_consequence and len(self._evidence) < self._servers:
                if self._timer is None:
                    self._timer = threading.Timer(CAUSE_SECONDS, self._settle)
                    self._timer.daemon = True
                    self._timer.start()
                return
        self._settle()

    def close(self) -> None:
        """Look no further."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()

    def _settle(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            cause = first_cause(self._evidence)
        self._found(cause)


def _reported(error: grpc.RpcError, target: str) -> GradwireError | None:
    """Return the error that a server sent as the end of a call; None if the call broke without one."""
    if isinstance(error, grpc.Call) and status_of(error) is not None:
        return from_rpc_error(error, target=target)
    return None


def own_error(error: BaseException) -> GradwireError:
    """Return an error of our own kind for whatever went wrong in the coordinator."""
    if isinstance(error, GradwireError):
        return error
    _log.error("unforeseen error in a run", exc_info=error)
    message = f"The coordinator failed: {type(error).__name__}: {error}"
    return InternalError(message, remedy="see its log; please report it")
