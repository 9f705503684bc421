"""Tensors survive the wire bit for bit, in value, type and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_protocol import frames
from gradwire_protocol.codecs import encoded_bytes
from gradwire_protocol.errors import FrameError
from gradwire_protocol.frames import Message
from gradwire_protocol.torch_tensors import DATA_TYPES, dense, is_dense, payload_of, tensor_from, tensor_info
from gradwire_protocol.v1 import tensors_pb2 as pb


def travel(tensor):
    key = pb.MessageKey(run="r", entry=1, direction=pb.DIRECTION_FORWARD, value="x")
    header = pb.TensorHeader(key=key, sequence=1, tensor=tensor_info(tensor))
    assembler = frames.FrameAssembler()
    return [assembler.feed(frame) for frame in frames.encode_frames(header, payload_of(tensor))][-1]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(DATA_TYPES, key=str)),
    st.lists(st.integers(0, 4), max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_type_shape_and_permuted_layout_travels_unchanged(dtype, shape, random):
    tensor = torch.randint(0, 2, shape).to(dtype) if dtype is torch.bool else (torch.randn(shape) * 50).to(dtype)
    order = list(range(len(shape)))
    random.shuffle(order)
    tensor = tensor.permute(order)
    arrived = tensor_from(travel(tensor))
    assert arrived.dtype == dtype
    assert arrived.shape == tensor.shape
    assert torch.equal(arrived, tensor)
    if tensor.numel():
        kept = [(a, b) for a, b, n in zip(arrived.stride(), tensor.stride(), tensor.shape, strict=True) if n > 1]
        assert all(a == b for a, b in kept)


def test_special_values_and_large_tensors_keep_their_bits():
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-310], dtype=torch.float64)
    assert payload_of(tensor_from(travel(special))) == payload_of(special)
    large = torch.randn(3, 1000, 1000).transpose(0, 2)
    assert torch.equal(tensor_from(travel(large)), large)


def test_a_single_chunk_is_read_in_place_and_aligned():
    arrived = tensor_from(travel(torch.randn(1000, dtype=torch.float64)))
    assert arrived.data_ptr() % 16 == 0


def test_what_is_not_dense_is_copied_first():
    expanded = torch.randn(3, 1).expand(3, 4)
    strided = torch.randn(6, 6)[::2, ::2]
    assert not is_dense(expanded)
    assert not is_dense(strided)
    assert torch.equal(tensor_from(travel(dense(expanded))), expanded)
    assert torch.equal(tensor_from(travel(dense(strided))), strided)
    whole = torch.randn(3, 4).t()
    assert dense(whole) is whole


@pytest.mark.parametrize("size", [3, 5000])
def test_what_is_only_to_be_conjugated_travels_as_it_is_read(size):
    conjugated = torch.randn(size, 2, dtype=torch.complex64).conj()
    for tensor in (conjugated, conjugated.imag):
        assert torch.equal(tensor_from(travel(dense(tensor))), tensor)


def test_types_that_cannot_travel_are_refused():
    with pytest.raises(FrameError, match="cannot travel"):
        tensor_info(torch.empty(1, dtype=torch.uint16))


def test_an_encoded_message_is_no_tensor():
    key = pb.MessageKey(run="r", generation=1, entry=1, value="h", direction=pb.DIRECTION_FORWARD)
    size = encoded_bytes(pb.CODEC_INT8, pb.DATA_TYPE_FLOAT32, 12)
    info = pb.TensorInfo(data_type=pb.DATA_TYPE_FLOAT32, shape=[3, 4], size_bytes=size, codec=pb.CODEC_INT8)
    message = Message(pb.TensorHeader(key=key, sequence=1, tensor=info), memoryview(bytes(size)))
    with pytest.raises(FrameError, match="'h' is encoded"):
        tensor_from(message)
