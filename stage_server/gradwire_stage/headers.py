"""Makes the headers of messages, each kind of them once: a stage sends the same few values over and over."""

from __future__ import annotations

import torch

from gradwire_protocol.codecs import set_codec
from gradwire_protocol.torch_tensors import tensor_info
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.keys import Key

Number = int | float | bool
Value = torch.Tensor | Number

# Batches whose sizes differ make one kind for each size.
_MAXIMUM_KINDS = 1024


def make_header(run: str, generation: int, key: Key, value: Value | None) -> pb.TensorHeader:
    """Return the header that carries a dense tensor, a number, or the statement that there is none."""
    header = pb.TensorHeader(key=key.to_proto(run, generation))
    if isinstance(value, torch.Tensor):
        header.tensor.CopyFrom(tensor_info(value))
    elif value is None:
        header.absent.SetInParent()
    elif isinstance(value, bool):  # a bool is an int too
        header.boolean = value
    elif isinstance(value, int):
        header.integer = value
    else:
        header.real = value
    return header


class Kind:
    """A kind of message, by its identity, and the header that was last made of it."""

    __slots__ = ("codec", "header")

    def __init__(self, header: pb.TensorHeader) -> None:
        self.header = header
        self.codec = header.tensor.codec


class Headers:
    """Headers of one generation of a run. For one thread, and each header until the next one is asked for."""

    def __init__(self, run: str, generation: int) -> None:
        self._run = run
        self._generation = generation
        self._kinds: dict[tuple[object, ...], Kind] = {}

    def of(self, key: Key, value: torch.Tensor, codec: pb.Codec) -> Kind:
        """Return the kind, and with it the header, of a message with a dense tensor.

        It travels under the codec, if it gains by that.
        """
        entry, micro_batch, *name = key
        described = (*name, codec, value.dtype, value.shape, value.stride(), value.requires_grad)
        kind = self._kinds.get(described)
        if kind is None:
            if len(self._kinds) >= _MAXIMUM_KINDS:
                self._kinds.clear()
            header = make_header(self._run, self._generation, key, value)
            set_codec(header.tensor, codec, value.numel())
            kind = self._kinds[described] = Kind(header)
        header_key = kind.header.key
        header_key.entry, header_key.micro_batch = entry, micro_batch
        return kind
