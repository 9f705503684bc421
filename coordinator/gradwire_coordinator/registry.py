"""Which servers there are: registered, heard of lately, and free or reserved by a run.

Passive and thread-safe; the clock is handed in. Leaves to others: acting on what is lost (`service.py`), and talking to
servers (`run.py`).
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from gradwire_coordinator.custom_operators import can_run, cannot_run, read_operators
from gradwire_protocol.channels import parse_address
from gradwire_protocol.errors import LimitExceeded, NotAllowed, PlanError, RunNotFound, SettingsError
from gradwire_protocol.v1 import coordinator_pb2, stage_pb2

MAXIMUM_SERVERS = 4096
_MAXIMUM_TEXT = 300
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Server:
    """What is known of one server."""

    server: str
    role: coordinator_pb2.ServerRole
    address: str
    metrics_address: str
    device: coordinator_pb2.DeviceInfo
    version: str
    # By the registry's clock.
    heard_at: float
    # When the first heartbeat came that showed its last progress, and the last progress of its run's client.
    progressed_at: float
    client_progressed_at: float
    activity: stage_pb2.Activity = field(default_factory=stage_pb2.Activity)
    # Schemas of its custom operators, by target.
    operators: Mapping[str, str] = field(default_factory=dict)
    # The run that has reserved it; empty: free.
    run: str = ""
    # The name in the certificate that it registered with; empty: plaintext.
    holder: str = ""
    # It was asked to stop.
    leaving: bool = False


@dataclass(frozen=True, kw_only=True)
class ServerStanding:
    """How a server stands: its activity, and for how long it and the client of its run have stood still with it."""

    activity: stage_pb2.Activity
    # Since its last heartbeat.
    silent_seconds: float
    # From the last progress to the last heartbeat.
    still_seconds: float
    client_still_seconds: float


# Of a role: what its servers are called in a plan and elsewhere, what starts one, and what takes fewer of them.
_WORDS = {
    coordinator_pb2.SERVER_ROLE_STAGE: (
        "servers",
        "stage server",
        "gradwire-stage-server",
        "stages, replicas or tensor-parallel servers",
    ),
    coordinator_pb2.SERVER_ROLE_PARAMETER: (
        "parameter servers",
        "parameter server",
        "gradwire-parameter-server",
        "of them",
    ),
}


class Registry:
    """Servers by identifier, in the order of registration."""

    def __init__(
        self,
        *,
        lease_seconds: float = 10.0,
        heartbeat_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._servers: dict[str, Server] = {}

    def register(
        self, request: coordinator_pb2.RegisterRequest, holder: str = ""
    ) -> tuple[coordinator_pb2.RegisterReply, Server | None]:
        """Take a server in; return its terms, and the registration that it replaces, if any.

        A server that registers anew has lost its state: the run that held the old one has lost a stage. holder: the
        name in its certificate. NotAllowed if the identifier is held by another one's.
        """
        _check_registration(request)
        self.check_holder(request.server, holder)
        now = self._clock()
        server = Server(
            server=request.server,
            role=request.role,
            address=request.address,
            metrics_address=request.metrics_address,
            device=request.device,
            version=request.version[:_MAXIMUM_TEXT],
            heard_at=now,
            progressed_at=now,
            client_progressed_at=now,
            operators=read_operators(request.operators, f"Server {request.server}", SettingsError),
            holder=holder,
        )
        with self._lock:
            replaced = self._servers.pop(server.server, None)
            if len(self._servers) >= MAXIMUM_SERVERS:
                raise LimitExceeded("Too many servers", expected=f"at most {MAXIMUM_SERVERS}")
            self._servers[server.server] = server
        reply = coordinator_pb2.RegisterReply(
            lease_seconds=self._lease_seconds, heartbeat_seconds=self._heartbeat_seconds
        )
        return reply, replaced

    def check_holder(self, identifier: str, holder: str) -> None:
        """Raise NotAllowed if a server was registered with another certificate's name than this."""
        with self._lock:
            server = self._servers.get(identifier)
        if server is not None and server.holder != holder:
            raise NotAllowed(
                f"Server {identifier} is registered with another certificate",
                expected=f"a certificate for {server.holder!r}",
                got=f"one for {holder!r}",
                remedy="give each server an identifier of its own, with --server",
            )

    def heartbeat(self, identifier: str, activity: stage_pb2.Activity, *, leaving: bool = False) -> Server:
        """Renew a lease; return the server. RunNotFound tells it that it must register again.

        leaving: no run gets it any more.
        """
        with self._lock:
            server = self._servers.get(identifier)
            if server is None:
                raise RunNotFound(
                    "The server is not registered here",
                    got=repr(identifier[:64]),
                    remedy="register again: the coordinator was restarted, or the lease ran out",
                )
            now = self._clock()
            before = server.activity
            same_run = (activity.run, activity.generation) == (before.run, before.generation)
            moved = not same_run or activity.progress != before.progress
            client_moved = not same_run or activity.client_progress != before.client_progress
            self._servers[identifier] = dataclasses.replace(
                server,
                heard_at=now,
                progressed_at=now if moved else server.progressed_at,
                client_progressed_at=now if client_moved else server.client_progressed_at,
                activity=activity,
                leaving=leaving or server.leaving,
            )
            return self._servers[identifier]

    def deregister(self, identifier: str) -> Server | None:
        """Take a server out; return what was known of it, None if nothing."""
        with self._lock:
            return self._servers.pop(identifier, None)

    def forgive(self, seconds: float) -> None:
        """Lengthen all leases by a time in which no heartbeat could be heard."""
        with self._lock:
            now = self._clock()
            for identifier, server in self._servers.items():
                shift = min(now - server.heard_at, seconds)
                self._servers[identifier] = dataclasses.replace(
                    server,
                    heard_at=server.heard_at + shift,
                    progressed_at=server.progressed_at + shift,
                    client_progressed_at=server.client_progressed_at + shift,
                )

    def expire(self) -> list[Server]:
        """Take out and return all servers whose lease has run out."""
        with self._lock:
            oldest = self._clock() - self._lease_seconds
            lost = [server for server in self._servers.values() if server.heard_at < oldest]
            for server in lost:
                del self._servers[server.server]
            return lost

    def reserve(
        self,
        run: str,
        count: int,
        operators: Mapping[str, str] = MappingProxyType({}),
        *,
        role: coordinator_pb2.ServerRole = coordinator_pb2.SERVER_ROLE_STAGE,
    ) -> list[Server]:
        """Reserve `count` free servers of a role for a run, in the order of registration; PlanError if there are fewer.

        Only such as have the custom `operators` that the run needs; ModelError if these alone are too few.
        """
        called, kind, program, fewer = _WORDS[role]
        with self._lock:
            known = [server for server in self._servers.values() if server.role == role and not server.leaving]
            free = [server for server in known if not server.run]
            if len(free) < count:
                busy = len(known) - len(free)
                raise PlanError(
                    f"The plan takes {count} {called}, but {len(free)} {kind}s are free",
                    expected=f"{count} free {kind}s",
                    got=f"{len(known)} registered, {busy} of them busy with other runs",
                    remedy=f"start more with {program}, wait for other runs to end, or plan fewer {fewer}",
                )
            able = [server for server in free if can_run(server.operators, operators)][:count]
            if len(able) < count:
                unable = [(server.server, server.operators) for server in free if server not in able]
                raise cannot_run(operators, unable)
            for server in able:
                self._servers[server.server] = dataclasses.replace(server, run=run)
            return [self._servers[server.server] for server in able]

    def release(self, run: str) -> None:
        """Free all servers of a run."""
        with self._lock:
            for identifier, server in self._servers.items():
                if server.run == run:
                    self._servers[identifier] = dataclasses.replace(server, run="")

    def servers(self) -> list[Server]:
        """Return all servers, in the order of registration."""
        with self._lock:
            return list(self._servers.values())

    def silent_seconds(self, server: Server) -> float:
        """Return how long ago a server was heard of."""
        return max(0.0, self._clock() - server.heard_at)

    def standing(self, identifier: str) -> ServerStanding | None:
        """Return how a server stands; None if it is not registered."""
        with self._lock:
            server = self._servers.get(identifier)
        if server is None:
            return None
        return ServerStanding(
            activity=server.activity,
            silent_seconds=self.silent_seconds(server),
            still_seconds=server.heard_at - server.progressed_at,
            client_still_seconds=server.heard_at - server.client_progressed_at,
        )

    def last_known(self, identifier: str) -> str:
        """Return in words what a server was last known to do."""
        with self._lock:
            server = self._servers.get(identifier)
        if server is None:
            return "not registered any more"
        return describe(server.activity, self.silent_seconds(server))


def describe(activity: stage_pb2.Activity, silent_seconds: float) -> str:
    """Return an activity in words: "1.2 s ago: entry 7, action 1F3, waiting for … since 0.4 s"."""
    if not activity.run:
        doing = ["idle"]
    else:
        doing = [f"entry {activity.entry}"]
        if activity.action:
            doing.append(f"action {activity.action[:_MAXIMUM_TEXT]}")
        if activity.waiting_for:
            waiting = activity.waiting_for[:_MAXIMUM_TEXT]
            doing.append(f"waiting for {waiting} since {activity.waiting_seconds:.1f} s")
    return f"{silent_seconds:.1f} s ago: {', '.join(doing)}"


def _check_registration(request: coordinator_pb2.RegisterRequest) -> None:
    if not _IDENTIFIER.fullmatch(request.server):
        raise SettingsError(
            "Not an identifier for a server",
            expected="1 to 64 letters, digits, dots, colons, hyphens or underscores",
            got=repr(request.server[:80]),
        )
    if request.role not in (coordinator_pb2.SERVER_ROLE_STAGE, coordinator_pb2.SERVER_ROLE_PARAMETER):
        raise SettingsError(f"Server {request.server} has no role", expected="stage or parameter")
    for address in filter(None, (request.address or " ", request.metrics_address)):
        if len(address) > _MAXIMUM_TEXT or parse_address(address)[1] == 0:
            raise SettingsError(
                f"Server {request.server} advertises an address that nobody can dial", got=repr(address[:80])
            )
