"""Every codec: what comes back is what went in, within the bound that the codec states, for any tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_protocol import codecs as protocol
from gradwire_protocol.errors import FrameError, LimitExceeded
from gradwire_protocol.frames import FrameAssembler, encode_frames
from gradwire_protocol.torch_tensors import DATA_TYPES, dense, payload_of, tensor_info
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.codecs import int8
from gradwire_stage.codecs.registry import CODECS, Encoded, encode, unpack

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOSSY = ("bf16", "fp16", "int8")


def through(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return what a receiver has of a dense tensor, straight from the codec."""
    codec = protocol.CODEC_NAMES[name]
    payload = encode(codec, tensor)
    assert payload.dtype == torch.uint8
    assert payload.dim() == 1
    assert payload.numel() == protocol.encoded_bytes(codec, DATA_TYPES[tensor.dtype], tensor.numel())
    strides = () if tensor.is_contiguous() else tensor.stride()
    back = Encoded(codec, tensor.dtype, tuple(tensor.shape), strides).decode(payload)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert tensor.numel() == 0 or back.stride() == tensor.stride()
    return back


def bounds(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the error that a codec allows each element of a flat finite tensor, in float64."""
    values = tensor.double()
    # Rounding back to the tensor's own type, whose smallest numbers are this far apart, and by way of float32.
    kind = torch.finfo(tensor.dtype)
    own = values.abs() * max(kind.eps, 2.0**-24) + kind.tiny * kind.eps
    if name == "bf16":
        return values.abs() * 2.0**-8 + 2.0**-134 + own
    if name == "fp16":
        return values.abs() * 2.0**-11 + 2.0**-25 + own
    if name == "int8":
        blocks = [values.abs()[start:][: protocol.INT8_BLOCK] for start in range(0, len(values), protocol.INT8_BLOCK)]
        largest = torch.cat([values[:0], *(block.amax().expand(len(block)) for block in blocks)])
        return largest / 254 * (1 + 1e-4) + 2.0**-120 + own
    return torch.zeros_like(values)


# One magnitude for a tensor, and another for each element: blocks with outliers, and with hardly anything but zeros.
@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(TYPES))
    size = draw(st.sampled_from((0, 1, 2, 3, 255, 256, 257, 511, 512, 513, 1000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    magnitude = draw(st.sampled_from((0.0, 1e-45, 1e-40, 1e-30, 1e-8, 1e-3, 1.0, 100.0, 1e30)))
    spread = draw(st.sampled_from((0.0, 1.0, 5.0)))
    values = torch.randn(size, generator=generator, dtype=torch.float64) * magnitude
    values *= torch.exp(torch.randn(size, generator=generator, dtype=torch.float64) * spread)
    limit = min(torch.finfo(dtype).max * 0.99, 1e38)  # in the range of all codecs but fp16
    return values.clamp(-limit, limit).to(dtype)


@pytest.mark.parametrize("name", protocol.CODEC_NAMES)
@given(tensor=tensors())
@settings(deadline=None, max_examples=150)
def test_what_comes_back_is_within_the_bound(name: str, tensor: torch.Tensor) -> None:
    if name == "fp16":
        tensor = tensor.clamp(-60000, 60000)
    back = through(name, tensor)
    error = (back.double() - tensor.double()).abs()
    assert bool((error <= bounds(name, tensor)).all()), (error - bounds(name, tensor)).max()
    # The same again: what is decoded is a value of the codec, or next to one.
    assert bool(((through(name, back).double() - tensor.double()).abs() <= 2.1 * bounds(name, tensor)).all())


@pytest.mark.parametrize("name", protocol.CODEC_NAMES)
@given(tensor=tensors(), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_what_is_not_finite_stays_and_does_no_harm_to_the_rest(name: str, tensor: torch.Tensor, seed: int) -> None:
    tensor = tensor.clamp(-60000, 60000)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=tensor.dtype)
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(0, max(1, len(tensor)), (3,), generator=generator) if len(tensor) else ():
        tensor[place] = special[int(torch.randint(0, 3, (), generator=generator))]
    back = through(name, tensor)
    finite = tensor.isfinite()
    assert torch.equal(back[~finite].nan_to_num(1), tensor[~finite].nan_to_num(1))
    assert torch.equal(back.isnan(), tensor.isnan())
    rest = torch.where(finite, tensor, 0)
    # 126 levels instead of 127 where int8 marks a block.
    assert bool(((back.double() - tensor.double()).abs() <= bounds(name, rest) * 127 / 126)[finite].all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(()),
        lambda: torch.randn(0, 4),
        lambda: torch.randn(5, 7, 9).permute(2, 0, 1),
        lambda: torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last),
        lambda: dense(torch.randn(6, 10)[:, ::3]),
        lambda: dense(torch.randn(300, 1).expand(300, 3)),
    ],
)
def test_shapes_and_layouts_come_back(name: str, dtype: torch.dtype, make: object) -> None:
    tensor = make().to(dtype)  # type: ignore[operator]
    back = through(name, tensor)
    flat = tensor.as_strided((tensor.numel(),), (1,)) if tensor.numel() else tensor.flatten()
    error = (back - tensor).double().abs()
    flat_error = error.as_strided((tensor.numel(),), (1,)) if tensor.numel() else error.flatten()
    assert bool((flat_error <= bounds(name, flat)).all())


def test_the_largest_and_the_smallest_magnitudes() -> None:
    largest = torch.finfo(torch.float32).max
    extremes = torch.tensor([largest, -largest, largest / 2, 0.0, 1.0])
    assert through("int8", extremes).isfinite().all()
    assert through("int8", extremes)[0] == pytest.approx(largest, rel=1e-6)
    assert torch.equal(through("int8", torch.full((300,), 1e-37)), torch.zeros(300))
    assert through("fp16", torch.tensor([65519.0, 65520.0, 2.0**-25, 2.0**-24])).tolist() == [
        65504,
        torch.inf,
        0,
        2**-24,
    ]
    assert through("bf16", torch.tensor([largest, 1e38])).tolist() == [torch.inf, pytest.approx(1e38, rel=2**-8)]
    # float64 beyond the range of float32.
    huge = torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)
    assert through("int8", huge).tolist()[:2] == [torch.inf, -torch.inf]
    assert through("int8", huge)[2] == pytest.approx(1.0)


def test_a_block_has_a_scale_of_its_own() -> None:
    tensor = torch.cat([torch.full((256,), 1e-6), torch.tensor([1e6]), torch.ones(255)])
    back = through("int8", tensor)
    assert torch.allclose(back[:256], tensor[:256], rtol=1e-5)
    assert torch.equal(back[257:], torch.zeros(255))


@given(tensor=tensors())
@settings(deadline=None, max_examples=60)
def test_both_ways_through_int8_are_the_same_where_everything_is_finite(tensor: torch.Tensor) -> None:
    """On a GPU the host does not look first whether a block is marked."""

    class Elsewhere(torch.Tensor):
        is_cpu = False

    tensor = tensor.to(torch.float32)
    payload = int8.encode(tensor)
    assert torch.equal(int8.encode(tensor.as_subclass(Elsewhere)).as_subclass(torch.Tensor), payload)
    slow = int8.decode(payload.as_subclass(Elsewhere), torch.float32).as_subclass(torch.Tensor)
    assert torch.equal(slow, int8.decode(payload, torch.float32))


def test_int8_as_the_contract_lays_it_out() -> None:
    payload = int8.encode(torch.tensor([127.0, -63.5, 1.0, 0.4]))
    assert payload[:4].view(torch.float32).tolist() == [1.0]
    assert payload[4:].view(torch.int8).tolist() == [127, -64, 1, 0]  # to nearest, and to even between two
    payload = int8.encode(torch.tensor([torch.nan, torch.inf, -torch.inf, 126.0, -63.0]))
    assert payload[:4].view(torch.float32).tolist() == [-1.0]
    assert payload[4:].view(torch.int8).tolist() == [-128, 127, -127, 126, -63]
    assert int8.encode(torch.tensor([torch.inf, 0.0]))[:4].view(torch.float32).signbit().all()


@pytest.mark.parametrize(
    ("name", "dtype", "elements", "chosen"),
    [
        ("fp16", torch.float32, 1, "fp16"),
        ("fp16", torch.float16, 100, "none"),
        ("fp16", torch.bfloat16, 100, "none"),
        ("bf16", torch.float16, 100, "none"),
        ("bf16", torch.float64, 3, "bf16"),
        ("int8", torch.float32, 1, "none"),  # a scale, and a number
        ("int8", torch.float32, 2, "int8"),
        ("int8", torch.bfloat16, 4, "none"),
        ("int8", torch.bfloat16, 5, "int8"),
        ("int8", torch.float32, 0, "none"),
        ("int8", torch.int64, 100, "none"),
        ("int8", torch.complex64, 100, "none"),
        ("none", torch.float32, 100, "none"),
    ],
)
def test_a_codec_is_used_only_where_it_gains(name: str, dtype: torch.dtype, elements: int, chosen: str) -> None:
    info = tensor_info(torch.zeros(elements, dtype=dtype))
    plain = info.size_bytes
    assert protocol.set_codec(info, protocol.CODEC_NAMES[name], elements) == protocol.CODEC_NAMES[chosen]
    assert info.codec == protocol.CODEC_NAMES[chosen]
    assert (info.size_bytes < plain) == (chosen != "none")


def header(tensor: torch.Tensor, codec: int, direction: pb.Direction = pb.DIRECTION_FORWARD) -> pb.TensorHeader:
    made = pb.TensorHeader(key=pb.MessageKey(run="r", entry=1, value="v", direction=direction), sequence=1)
    made.tensor.CopyFrom(tensor_info(tensor))
    made.tensor.codec = codec  # type: ignore[assignment]
    if tensor.dtype in TYPES and codec in protocol.NAME_OF_CODEC:
        made.tensor.size_bytes = protocol.encoded_bytes(codec, made.tensor.data_type, tensor.numel())
    return made


@pytest.mark.parametrize("name", protocol.CODEC_NAMES)
@pytest.mark.parametrize("shape", [(), (3,), (700, 5), (300, 4096)])
def test_over_frames(name: str, shape: tuple[int, ...]) -> None:
    tensor, codec = torch.randn(shape), protocol.CODEC_NAMES[name]
    assembler = FrameAssembler()
    messages = [
        assembler.feed(frame) for frame in encode_frames(header(tensor, codec), payload_of(encode(codec, tensor)))
    ]
    message = messages[-1]
    assert message is not None
    received, encoded = unpack(message)
    assert (encoded is None) == (name == "none")
    assert torch.equal(received if encoded is None else encoded.decode(received), through(name, tensor))


def test_malformed_encodings_are_refused_before_anything_is_allocated() -> None:
    def feed(made: pb.TensorHeader, limit: int = 2**20) -> None:
        FrameAssembler(limit).feed(pb.TensorFrame(header=made).SerializeToString())

    good = torch.zeros(600)
    for codec in range(2, 5):
        feed(header(good, codec))
        feed(header(good, codec, pb.DIRECTION_BACKWARD))
        wrong = header(good, codec)
        wrong.tensor.size_bytes += 1
        with pytest.raises(FrameError, match="does not fit its shape"):
            feed(wrong)
        for direction in (pb.DIRECTION_BATCH, pb.DIRECTION_STATE, pb.DIRECTION_TIED, pb.DIRECTION_RESULT):
            with pytest.raises(FrameError, match="must not be"):
                feed(header(good, codec, direction))
        for other in (torch.zeros(600, dtype=torch.int64), torch.zeros(600, dtype=torch.complex64)):
            with pytest.raises(FrameError, match="must not be"):
                feed(header(other, codec))
        # What is decoded counts, too.
        with pytest.raises(LimitExceeded, match="too large"):
            feed(header(good, codec), 2399)
    with pytest.raises(FrameError, match="Unknown codec"):
        feed(header(good, 77))


def test_every_codec_of_the_protocol_is_there() -> None:
    numbers = set(pb.Codec.values()) - {pb.CODEC_UNSPECIFIED}
    assert CODECS.keys() == protocol.NAME_OF_CODEC.keys() == numbers
