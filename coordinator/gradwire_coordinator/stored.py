"""What the coordinator says of a checkpoint that servers are to load: that it is whole, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable

from gradwire_protocol.channels import MAXIMUM_MESSAGE_BYTES
from gradwire_protocol.checkpoint.reader import StoredCheckpoint
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.errors import CheckpointError
from gradwire_protocol.safetensors_format import StoredTensor
from gradwire_protocol.v1 import coordinator_pb2 as pb


def inspect(root: CheckpointRoot, directory: str) -> pb.InspectCheckpointReply:
    """Check every file of a checkpoint, and describe its tensors; CheckpointError or SettingsError."""
    checkpoint = StoredCheckpoint(root.stored(directory), root=root.path())
    reply = pb.InspectCheckpointReply(
        manifest=checkpoint.text.decode(),
        manifest_sha256=checkpoint.sha256,
        model=_described(checkpoint.model.values()),
        optimizer=_described(checkpoint.optimizer.values()),
    )
    if reply.ByteSize() > MAXIMUM_MESSAGE_BYTES:
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} has too many tensors to be described in a message",
            expected=f"{MAXIMUM_MESSAGE_BYTES} bytes at most",
            got=str(reply.ByteSize()),
            remedy='load it with storage="client"',
        )
    return reply


def _described(tensors: Iterable[StoredTensor]) -> list[pb.CheckpointTensor]:
    return [pb.CheckpointTensor(name=item.name, data_type=item.data_type, shape=item.shape) for item in tensors]
