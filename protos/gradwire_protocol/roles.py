"""Roles: who may call what. One table for every method of every service; what is not in it, nobody may call.

A role stands in a certificate (certificates.py) and is checked around every call (peer_roles.py). Plaintext knows none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType

from gradwire_protocol.errors import NotAllowed


class Role(StrEnum):
    """What the holder of a certificate is."""

    CLIENT = "client"
    COORDINATOR = "coordinator"
    STAGE = "stage"
    PARAMETER = "parameter"
    # The service that hands certificates out on join tokens. It calls nobody.
    ENROLMENT = "enrolment"


class Served(StrEnum):
    """What a server's certificate says that it serves: whoever dials checks it, besides the host."""

    COORDINATOR = "coordinator-service"
    STAGE = "stage-service"
    ENROLMENT = "enrolment-service"


SERVED_BY: Mapping[Role, Served] = MappingProxyType(
    {
        Role.COORDINATOR: Served.COORDINATOR,
        Role.STAGE: Served.STAGE,
        Role.PARAMETER: Served.STAGE,
        Role.ENROLMENT: Served.ENROLMENT,
    }
)

# How a role stands in a certificate, among its URIs.
ROLE_PREFIX = "spiffe://gradwire/role/"

# What certificates are issued for.
MEMBERS = (Role.CLIENT, Role.COORDINATOR, Role.STAGE, Role.PARAMETER)

_CLIENT = frozenset({Role.CLIENT})
_COORDINATOR = frozenset({Role.COORDINATOR})
_SERVERS = frozenset({Role.STAGE, Role.PARAMETER})
_EVERYBODY = frozenset(MEMBERS)

_COORDINATOR_SERVICE = "/gradwire_protocol.v1.CoordinatorService/"
_STAGE_SERVICE = "/gradwire_protocol.v1.StageService/"
_HEALTH = "/grpc.health.v1.Health/"

# The one method that takes a join token in place of a certificate.
ENROLL = "/gradwire_protocol.v1.EnrolmentService/Enroll"

# The one table: method, and the roles that may call it.
CALLERS: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        _COORDINATOR_SERVICE + "Register": _SERVERS,
        _COORDINATOR_SERVICE + "Heartbeat": _SERVERS,
        _COORDINATOR_SERVICE + "Deregister": _SERVERS,
        _COORDINATOR_SERVICE + "CreateRun": _CLIENT,
        _COORDINATOR_SERVICE + "Plan": _CLIENT,
        _COORDINATOR_SERVICE + "Drive": _CLIENT,
        _COORDINATOR_SERVICE + "Replan": _CLIENT,
        _COORDINATOR_SERVICE + "EndRun": _CLIENT,
        _COORDINATOR_SERVICE + "BeginSave": _CLIENT,
        _COORDINATOR_SERVICE + "InspectCheckpoint": _CLIENT,
        _COORDINATOR_SERVICE + "GetStatus": _CLIENT,
        _STAGE_SERVICE + "Prepare": _COORDINATOR,
        _STAGE_SERVICE + "Execute": _COORDINATOR,
        _STAGE_SERVICE + "Release": _COORDINATOR,
        _STAGE_SERVICE + "MeasureLinks": _COORDINATOR,
        _STAGE_SERVICE + "MeasureCosts": _COORDINATOR,
        _STAGE_SERVICE + "GetActivity": _COORDINATOR | _CLIENT,
        _STAGE_SERVICE + "Deliver": _CLIENT | _SERVERS,
        _STAGE_SERVICE + "Collect": _CLIENT,
        _STAGE_SERVICE + "OfferStream": _SERVERS,
        _STAGE_SERVICE + "OfferSharedBlock": _SERVERS,
        _STAGE_SERVICE + "Probe": _SERVERS,
        ENROLL: _EVERYBODY,
        _HEALTH + "Check": _EVERYBODY,
        _HEALTH + "Watch": _EVERYBODY,
    }
)


def role_of(uris: Iterable[str]) -> Role | None:
    """Return the role that a certificate's URIs name: None if they name none, or several, or one that is not ours."""
    named = [uri.removeprefix(ROLE_PREFIX) for uri in uris if uri.startswith(ROLE_PREFIX)]
    if len(named) != 1:
        return None
    return next((role for role in Role if role == named[0]), None)


def check_call(method: str, role: Role | None, name: str) -> None:
    """Raise NotAllowed unless the holder of a certificate may call a method.

    role: the certificate's; None: it has none. name: the certificate's, for the message.
    """
    callers = CALLERS.get(method, frozenset())
    if role in callers:
        return
    shown = method.removeprefix("/")
    allowed = " or ".join(sorted(callers))
    raise NotAllowed(
        f"A certificate of the role {role} may not call {shown}"
        if role is not None
        else f"A certificate without a role may not call {shown}",
        expected=f"a certificate of the role {allowed}" if allowed else "nobody: the method is in no role's table",
        got=f"one of the role {role}, for {name!r}" if role is not None else f"one without a role, for {name!r}",
        remedy=f"issue one with `gradwire certs issue DIR --role {next(iter(sorted(callers)))} …`" if allowed else "",
    )
