"""The coordinator's methods, as the rest of the client calls them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from gradwire_protocol.errors import from_rpc_error
from gradwire_protocol.v1 import coordinator_pb2, coordinator_pb2_grpc

_BEGIN_SAVE_SECONDS = 60.0
# Every byte of a checkpoint is read in it.
_INSPECT_SECONDS = 4 * 3600.0
# Segments are built in it, on all servers at once; a model of a billion parameters takes some seconds.
_CREATE_SECONDS = 300.0


def coordinator_stub(channel: Any) -> Any:
    """Return the generated stub of CoordinatorService; generated code has no annotations."""
    return coordinator_pb2_grpc.CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]


@contextmanager
def _typed(target: str) -> Iterator[None]:
    """Raise the coordinator's typed error in place of gRPC's. target: how errors name it."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, target=target) from None


def create_run(channel: Any, target: str, request: coordinator_pb2.CreateRunRequest) -> coordinator_pb2.CreateRunReply:
    """Have a run laid out and prepared; raises the coordinator's typed error. target: how errors name it."""
    with _typed(target):
        layout: coordinator_pb2.CreateRunReply = coordinator_stub(channel).CreateRun(request, timeout=_CREATE_SECONDS)
    return layout


def plan_run(channel: Any, target: str, request: coordinator_pb2.CreateRunRequest) -> coordinator_pb2.PlanReply:
    """Ask what `create_run` would lay out, and what a step of it is expected to take; raises as that does."""
    with _typed(target):
        reply: coordinator_pb2.PlanReply = coordinator_stub(channel).Plan(request, timeout=_CREATE_SECONDS)
    return reply


def replan_run(channel: Any, target: str, request: coordinator_pb2.ReplanRequest) -> coordinator_pb2.ReplanReply:
    """Have a run planned anew, and another layout prepared if that pays; raises why it cannot be, or the run's end."""
    with _typed(target):
        reply: coordinator_pb2.ReplanReply = coordinator_stub(channel).Replan(request, timeout=_CREATE_SECONDS)
    return reply


def begin_save(channel: Any, target: str, request: coordinator_pb2.BeginSaveRequest) -> coordinator_pb2.BeginSaveReply:
    """Announce a checkpoint that servers will write; raises why it cannot be written."""
    with _typed(target):
        reply: coordinator_pb2.BeginSaveReply = coordinator_stub(channel).BeginSave(
            request, timeout=_BEGIN_SAVE_SECONDS
        )
    return reply


def inspect_checkpoint(
    channel: Any, target: str, request: coordinator_pb2.InspectCheckpointRequest
) -> coordinator_pb2.InspectCheckpointReply:
    """Have a checkpoint below the coordinator's root checked; raises what is wrong with it."""
    with _typed(target):
        reply: coordinator_pb2.InspectCheckpointReply = coordinator_stub(channel).InspectCheckpoint(
            request, timeout=_INSPECT_SECONDS
        )
    return reply
