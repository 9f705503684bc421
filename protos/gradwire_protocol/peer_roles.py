"""Who is on the other side of a call, from its verified certificate; and the check of its role around every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from gradwire_protocol.errors import with_behaviour
from gradwire_protocol.roles import Role, check_call, role_of


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The holder of a certificate. addresses: all names and numbers in it, as they stand there."""

    role: Role | None
    name: str
    addresses: tuple[str, ...]

    @classmethod
    def of(cls, context: Any) -> Peer | None:
        """Return the peer of a call; None where the connection is plaintext. context: of grpc.ServicerContext."""
        properties: Mapping[str, Sequence[bytes]] = context.auth_context()
        if properties.get("transport_security_type") != [b"ssl"]:
            return None
        return cls(
            role=role_of(_texts(properties, "peer_uri")),
            name=next(iter(_texts(properties, "x509_common_name")), ""),
            addresses=(*_texts(properties, "peer_dns"), *_texts(properties, "peer_ip")),
        )


class RoleInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]  # grpcio has no type information
    """Refuses every call that the role of its caller's certificate does not allow. For servers that bind with TLS."""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None

        def checked(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            def call(request: Any, context: Any) -> Any:
                peer = Peer.of(context)
                check_call(details.method, peer.role if peer else None, peer.name if peer else "")
                return behaviour(request, context)

            return call

        return with_behaviour(handler, checked)


def _texts(properties: Mapping[str, Sequence[bytes]], name: str) -> list[str]:
    return [value.decode("utf-8", "replace") for value in properties.get(name, ())]
