"""Every method of every service, called with every role over mutual TLS: the table is what is enforced."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from odd_certificates import careless_channel, odd

import gradwire_protocol.v1
from gradwire.certs.authority import Authority
from gradwire.certs.members import issue
from gradwire_protocol.errors import NotAllowed, from_rpc_error
from gradwire_protocol.roles import CALLERS, ENROLL, MEMBERS, ROLE_PREFIX, Role
from gradwire_protocol.serving import Service, ServiceSettings
from gradwire_protocol.v1 import coordinator_pb2_grpc, stage_pb2_grpc

CALLED = sorted(set(CALLERS) - {ENROLL})
# None: a certificate of the authority without a role of ours.
ROLES = (*MEMBERS, Role.ENROLMENT, None)


def kinds() -> dict[str, str]:
    """Return by which of a channel's methods each method is called."""
    files = [health_pb2.DESCRIPTOR]
    files += [
        importlib.import_module(f"gradwire_protocol.v1.{module.name}").DESCRIPTOR
        for module in pkgutil.iter_modules(gradwire_protocol.v1.__path__)
        if module.name.endswith("_pb2")
    ]
    ways = ("unary", "stream")
    return {
        f"/{service.full_name}/{method.name}": f"{ways[method.client_streaming]}_{ways[method.server_streaming]}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


KINDS = kinds()


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Role | None, Any]]:
    """One server with all services, which implement nothing, and a channel for each role."""
    folder: Path = tmp_path_factory.mktemp("roles")
    authority = Authority.create(folder / "authority")
    files = issue(authority, role=Role.STAGE, name="server", addresses=["127.0.0.1"])
    service = Service("everything", ServiceSettings(metrics_listen="", tls=files))
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(
        coordinator_pb2_grpc.CoordinatorServiceServicer(), service.server
    )
    stage_pb2_grpc.add_StageServiceServicer_to_server(stage_pb2_grpc.StageServiceServicer(), service.server)
    service.start()
    with ExitStack() as stack:
        stack.callback(service.stop, 0.0)
        opened = {}
        for role in ROLES:
            uris = [] if role is None else [ROLE_PREFIX + role]
            own = odd(authority, folder / str(role), uris=uris)
            opened[role] = stack.enter_context(careless_channel(service.address, own, authority.trusted_pem))
        yield opened


def call(channel: Any, method: str) -> grpc.RpcError | None:
    kind = KINDS[method]
    request = iter([b""]) if kind.startswith("stream") else b""
    try:
        reply = getattr(channel, kind)(method)(request, timeout=20)
        if kind.endswith("stream"):
            next(reply)
            reply.cancel()
    except grpc.RpcError as error:
        return error
    return None


@pytest.mark.parametrize("method", CALLED)
@pytest.mark.parametrize("role", ROLES, ids=str)
def test_a_role_may_call_what_is_its(channels: dict[Role | None, Any], role: Role | None, method: str) -> None:
    error = call(channels[role], method)
    if role in CALLERS[method]:
        # The health service answers; the others have nothing behind them.
        assert error is None or error.code() is grpc.StatusCode.UNIMPLEMENTED
        return
    assert error is not None
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    restored = from_rpc_error(error)
    assert isinstance(restored, NotAllowed)
    assert method.removeprefix("/") in restored.message
    for allowed in CALLERS[method]:
        assert allowed in restored.expected
    assert (str(role) if role is not None else "without a role") in restored.got
    assert "gradwire certs issue" in restored.remedy


def test_plaintext_on_loopback_knows_no_roles() -> None:
    service = Service("plain", ServiceSettings(metrics_listen=""))
    stage_pb2_grpc.add_StageServiceServicer_to_server(stage_pb2_grpc.StageServiceServicer(), service.server)
    service.start()
    try:
        with grpc.insecure_channel(service.address) as channel:
            error = call(channel, "/gradwire_protocol.v1.StageService/Prepare")
            assert error is not None
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        service.stop(0.0)
