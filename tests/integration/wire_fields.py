"""Every field of the protocol that holds text or bytes: which become paths where they arrive, and which never do.

A field that is new belongs into one of the two. What becomes a path has its attack in test_paths.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import gradwire_protocol.v1

# Whole names, or what holds names of files (a manifest, a token).
PATHS = frozenset(
    {
        "BeginSaveRequest.directory",
        "BeginSaveRequest.manifest",
        "EnrollRequest.name",
        "EnrollRequest.token",
        "InspectCheckpointReply.manifest",
        "InspectCheckpointRequest.directory",
        "LoadState.weights_directory",
        "OfferSharedBlockRequest.socket",
        "OfferStreamRequest.socket",
        "SaveState.directory",
        "SaveState.token",
        "SavedFile.name",
        "StoredState.directory",
    }
)

# Message: fields that are compared, looked up, shown, parsed or kept as they are. Of those that sound like a path:
# StoredCheckpoint.directory is shown, and comes back as InspectCheckpointRequest.directory; BeginSaveReply.token comes
# back as SaveState.token; Node.source is shown.
NO_PATHS = {
    "Activity": "run action waiting_for phase",
    "Argument": "value text device_kind",
    "Autocast": "device_kind",
    "BeginSaveReply": "token",
    "BeginSaveRequest": "run",
    "BufferUpdate": "value tensor",
    "CheckpointTensor": "name",
    "CollectRequest": "run",
    "CreateRunReply": "run",
    "CreateRunRequest": "description",
    "CustomOperator": "target schema",
    "DeregisterRequest": "server",
    "DeviceInfo": "kind name",
    "DriveRequest": "run",
    "EndRunRequest": "run",
    "EnrollReply": "certificate authority",
    "EnrollRequest": "signing_request addresses",
    "EntryResult.TimingsEntry": "key",
    "ExecuteRequest": "run",
    "GetStatusReply": "version",
    "Graph": "mutated_tensors mutated_inputs",
    "GraphInput": "value label",
    "GraphOutput": "value",
    "GroupCost": "failure",
    "HeartbeatRequest": "server",
    "IncomingValue": "value",
    "InputUse": "values",
    "InspectCheckpointReply": "manifest_sha256",
    "LinkMeasurement": "address",
    "LinkPrediction": "reason",
    "LoadState": "weights_prefix",
    "MeasureLinksRequest": "addresses",
    "MessageKey": "run value state",
    "Move": "tensor from_server to_server states",
    "NamedArgument": "name",
    "NewPlan": "servers schedule",
    "Node": "name target module_path source mutated_keyword_arguments",
    "OfferSharedBlockReply": "reason explanation",
    "OfferSharedBlockRequest": "run server ticket",
    "OfferStreamReply": "reason explanation",
    "OfferStreamRequest": "run server ticket",
    "Optimizer": "name",
    "OptimizerGroup": "parameters",
    "OptimizerNumber": "parameter state",
    "OptimizerStateName": "parameter state",
    "OutgoingValue": "value",
    "Peer": "server address",
    "Plan": "schedule activation_compression exchange compression zero transport",
    "PlanCandidate": "schedule",
    "PlanSummary": "schedule compression zero_reason exchange compression_reason transport transport_reason",
    "Prediction": "reason cost_source",
    "PrepareRequest": "run server compression transport",
    "ProbeReply": "payload",
    "ProbeRequest": "payload",
    "RegisterRequest": "server address metrics_address version",
    "ReleaseRequest": "run reason",
    "ReplanRequest": "run",
    "ResultValue": "value",
    "RunStatus": "run description reason",
    "SaveFailure": "message expected got remedy",
    "SaveState": "kept",
    "SaveState.KeysEntry": "key value",
    "SaveState.TiedEntry": "key value",
    "SavedFile": "sha256",
    "Segment": "mutated_tensors mutated_inputs loss loss_weight",
    "ServerLayout": "server address tensors results owned_tensors",
    "ServerPrediction": "server",
    "ServerStatus": "server address metrics_address version",
    "SharedSlot": "block",
    "SplitParameter": "name split",
    "StageSummary": "first_module last_module codec_reason",
    "StopRequest": "reason",
    "StoredCheckpoint": "directory",
    "StoredState": "manifest_sha256 kept",
    "StoredState.KeysEntry": "key value",
    "TensorChunk": "padding data",
    "TensorPlacement": "parameter_server",
    "TensorRule": "pattern split",
    "TensorSpec": "name names",
    "TensorUse": "value tensor",
    "Timing.BusySecondsEntry": "key",
    "Timing.IdleSecondsEntry": "key",
    "Unreceipted": "server",
    "UntakenBound": "value",
    "Wait": "server",
}


def text_fields() -> set[str]:
    """Every field of every message that holds text or bytes, as MESSAGE.FIELD."""
    found: set[str] = set()
    for module in pkgutil.iter_modules(gradwire_protocol.v1.__path__):
        if module.name.endswith("_pb2"):
            made = importlib.import_module(f"gradwire_protocol.v1.{module.name}")
            for message in made.DESCRIPTOR.message_types_by_name.values():
                found.update(_fields_of(message))
    return found


def _fields_of(message: Any) -> Iterator[str]:
    name = message.full_name.removeprefix("gradwire_protocol.v1.")
    for field in message.fields:
        if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            yield f"{name}.{field.name}"
    for nested in message.nested_types:
        yield from _fields_of(nested)
