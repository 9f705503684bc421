"""What is to be known of messages that differ from a checked one in entry and micro-batch alone: worked out once."""

from __future__ import annotations

import torch

from gradwire_protocol.frames import Message, decoded_bytes
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.arrivals import is_answered, key_of
from gradwire_stage.codecs.registry import Encoded, unpack


class KnownKind:
    """A kind of message with a payload, by the header of one of them that has passed all checks."""

    __slots__ = (
        "_data_type",
        "_header",
        "_shape",
        "answered",
        "codec",
        "decoded_bytes",
        "key",
        "sender",
        "size_bytes",
        "wants_gradient",
    )

    def __init__(self, header: pb.TensorHeader, sender: str) -> None:
        self._header = header
        info = header.tensor
        self.key = key_of(header)
        self.sender = sender  # a server, or the client
        self.codec: int = info.codec
        self.size_bytes: int = info.size_bytes
        self.decoded_bytes = decoded_bytes(info)
        self.wants_gradient: bool = info.requires_grad
        self.answered = is_answered(header)
        self._data_type = TORCH_TYPES[info.data_type]
        # None: it takes more than a view.
        self._shape = None if info.codec != pb.CODEC_NONE or info.strides else tuple(info.shape)

    def unpack(self, payload: memoryview) -> tuple[torch.Tensor, Encoded | None]:
        """Do what `registry.unpack` does."""
        if self._shape is None:
            return unpack(Message(self._header, payload))
        return torch.frombuffer(payload, dtype=self._data_type).view(self._shape), None
