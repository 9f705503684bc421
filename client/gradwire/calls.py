"""The coordinator's methods, as the rest of the client calls them."""

from __future__ import annotations

from typing import Any

from gradwire_protocol.v1 import coordinator_pb2_grpc


def coordinator_stub(channel: Any) -> Any:
    """Return the generated stub of CoordinatorService; generated code has no annotations."""
    return coordinator_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
