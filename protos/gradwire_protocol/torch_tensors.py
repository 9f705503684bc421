"""Tensors to messages and back, without a copy. The only module of this package that imports torch."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence

import torch

from gradwire_protocol.checkpoint.files import RawTensor
from gradwire_protocol.delivery import Payload
from gradwire_protocol.errors import CheckpointError, FrameError
from gradwire_protocol.frames import Message
from gradwire_protocol.safetensors_format import STORED_TYPES, StoredTensor
from gradwire_protocol.v1 import tensors_pb2 as pb

DATA_TYPES: dict[torch.dtype, pb.DataType] = {
    torch.float64: pb.DATA_TYPE_FLOAT64,
    torch.float32: pb.DATA_TYPE_FLOAT32,
    torch.float16: pb.DATA_TYPE_FLOAT16,
    torch.bfloat16: pb.DATA_TYPE_BFLOAT16,
    torch.int64: pb.DATA_TYPE_INT64,
    torch.int32: pb.DATA_TYPE_INT32,
    torch.int16: pb.DATA_TYPE_INT16,
    torch.int8: pb.DATA_TYPE_INT8,
    torch.uint8: pb.DATA_TYPE_UINT8,
    torch.bool: pb.DATA_TYPE_BOOL,
    torch.complex64: pb.DATA_TYPE_COMPLEX64,
    torch.complex128: pb.DATA_TYPE_COMPLEX128,
}
TORCH_TYPES: dict[int, torch.dtype] = {number: dtype for dtype, number in DATA_TYPES.items()}
_COPIED_BYTES = 2**14
_STORED_NAMES = {TORCH_TYPES[number]: name for name, number in STORED_TYPES.items()}

# torch warns, once a process, that received buffers are read-only. They are, by contract: nobody writes to them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap (strides are permuted contiguous ones)."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if it is dense, else a dense copy (expanded, strided, and lazily conjugated tensors)."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.numel() == 0 or is_dense(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def tensor_info(tensor: torch.Tensor) -> pb.TensorInfo:
    """Describe a dense tensor. Strides are left out where they are the contiguous ones."""
    data_type = DATA_TYPES.get(tensor.dtype)
    if data_type is None:
        raise FrameError(
            f"Tensors of {tensor.dtype} cannot travel",
            expected=f"one of {sorted(map(str, DATA_TYPES))}",
            remedy="convert it",
        )
    return pb.TensorInfo(
        data_type=data_type,
        shape=tensor.shape,
        strides=() if tensor.is_contiguous() else tensor.stride(),
        size_bytes=tensor.numel() * tensor.element_size(),
        codec=pb.CODEC_NONE,
        requires_grad=tensor.requires_grad,
    )


def memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a dense tensor as they lie in memory: flat, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def payload_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a dense CPU tensor, in memory order. They keep its memory alive, or are a copy if few."""
    size = tensor.nbytes
    if size == 0:
        return memoryview(b"")
    # The way without a copy goes through four operators, which take longer than a copy of a few kilobytes.
    if size <= _COPIED_BYTES:
        return memoryview(ctypes.string_at(tensor.data_ptr(), size))
    flat = memory_order(tensor.detach())
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    return flat.view(torch.uint8).numpy().data


def tensor_from(message: Message) -> torch.Tensor:
    """Return the tensor that a message carries, over the message's own memory: never write to it.

    Its requires_grad is left to the receiver (`message.header.tensor.requires_grad`). FrameError for an encoded one,
    which only those take who have its codec.
    """
    info = message.header.tensor
    dtype = TORCH_TYPES[info.data_type]
    if message.payload is None:
        return torch.empty(tuple(info.shape), dtype=dtype)
    if info.codec != pb.CODEC_NONE:
        raise FrameError(
            f"Tensor {message.header.key.value!r} is encoded",
            expected=pb.Codec.Name(pb.CODEC_NONE),
            got=pb.Codec.Name(info.codec),
        )
    flat = torch.frombuffer(message.payload, dtype=dtype)
    if info.strides:
        return flat.as_strided(tuple(info.shape), tuple(info.strides))
    return flat.view(tuple(info.shape))


def tensor_from_file(stored: StoredTensor, data_type: int) -> torch.Tensor:
    """Read a tensor from its file into memory of its own, and convert it to the type wanted, if it has another."""
    dtype = TORCH_TYPES[stored.data_type]
    if stored.size_bytes == 0:
        return torch.empty(stored.shape, dtype=TORCH_TYPES[data_type])
    return torch.frombuffer(stored.read(), dtype=dtype).view(stored.shape).to(TORCH_TYPES[data_type])


def raw_tensor(name: str, data_type: torch.dtype, shape: Sequence[int], payload: Payload) -> RawTensor:
    """Describe a tensor for a file. payload: its bytes in the order of the dimensions.

    CheckpointError for an element type that the files' format does not have.
    """
    stored = _STORED_NAMES.get(data_type)
    if stored is None:
        raise CheckpointError(
            f"{name} cannot be written to a checkpoint",
            expected=", ".join(str(dtype) for dtype in _STORED_NAMES),
            got=str(data_type),
        )
    return RawTensor(name, stored, tuple(shape), payload)


def raw_from(name: str, tensor: torch.Tensor) -> RawTensor:
    """Describe a tensor, on any device, for a file; its bytes are fetched when they are written."""
    return raw_tensor(name, tensor.dtype, tensor.shape, lambda: payload_of(tensor.detach().cpu().contiguous()))
