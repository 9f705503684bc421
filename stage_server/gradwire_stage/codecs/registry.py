"""Codecs by their number on the wire: tensors to payloads and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradwire_protocol.frames import Message
from gradwire_protocol.torch_tensors import TORCH_TYPES, memory_order, tensor_from
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.codecs import bf16, fp16, int8, none


@dataclass(frozen=True, slots=True)
class Codec:
    """Two pure functions, for floating tensors. Both keep the device."""

    # From elements (flat, contiguous) to bytes (flat, uint8), as many as gradwire_protocol.codecs.encoded_bytes says.
    encode: Callable[[torch.Tensor], torch.Tensor]
    # From such bytes to elements of the type wanted (flat). May share memory with the bytes.
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]


CODECS: dict[int, Codec] = {
    pb.CODEC_NONE: Codec(none.encode, none.decode),
    pb.CODEC_BF16: Codec(bf16.encode, bf16.decode),
    pb.CODEC_FP16: Codec(fp16.encode, fp16.decode),
    pb.CODEC_INT8: Codec(int8.encode, int8.decode),
}

if CODECS.keys() != set(pb.Codec.values()) - {pb.CODEC_UNSPECIFIED}:
    raise RuntimeError("every codec of the protocol needs an implementation in gradwire_stage.codecs")


@dataclass(frozen=True, slots=True)
class Encoded:
    """How to make a tensor of a payload."""

    codec: int
    data_type: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # empty: contiguous

    def decode(self, payload: torch.Tensor) -> torch.Tensor:
        """Return the tensor that was encoded, as far as the codec kept it."""
        flat = CODECS[self.codec].decode(payload, self.data_type)
        return flat.as_strided(self.shape, self.strides) if self.strides else flat.view(self.shape)


def unpack(message: Message) -> tuple[torch.Tensor, Encoded | None]:
    """Return what a message carries, over its own memory: a tensor, or a payload and how to decode it."""
    info = message.header.tensor
    if info.codec == pb.CODEC_NONE or message.payload is None:
        return tensor_from(message), None
    payload = torch.frombuffer(message.payload, dtype=torch.uint8)
    return payload, Encoded(info.codec, TORCH_TYPES[info.data_type], tuple(info.shape), tuple(info.strides))


def encode(codec: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return the payload of a dense floating tensor: flat bytes, on the tensor's device."""
    return CODECS[codec].encode(memory_order(tensor.detach()))
