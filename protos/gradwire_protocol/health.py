"""Asks a service on this machine, by its own settings, whether it serves: for health checks of containers.

With its own certificate, since nobody without one gets an answer.
"""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire_protocol.channels import open_channel, parse_address
from gradwire_protocol.errors import SettingsError, Unreachable, from_rpc_error
from gradwire_protocol.roles import Served
from gradwire_protocol.serving import ServiceSettings

_ANSWER_SECONDS = 5.0
_OF_ANY_INTERFACE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def check_health(settings: ServiceSettings, serves: Served) -> None:
    """Return if the service with these settings says that it serves; Unreachable if it does not, or not in time."""
    host, port = parse_address(settings.listen)
    if port == 0:
        raise SettingsError(
            "A service on any free port cannot be asked for its health",
            expected="--listen HOST:PORT as the service has it",
            got=settings.listen,
        )
    host = _OF_ANY_INTERFACE.get(host, host)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    named = parse_address(settings.advertise)[0] if settings.advertise else host
    channel = open_channel(address, settings.tls, serves=serves, host=named, insecure=settings.insecure)
    try:
        reply: Any = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
    except grpc.RpcError as error:
        raise from_rpc_error(error, target=f"the service at {address}") from None
    finally:
        channel.close()
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unreachable(
            f"The service at {address} does not serve",
            expected="SERVING",
            got=health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status),
        )
