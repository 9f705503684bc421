"""Codecs of gradients: as text and back, what is refused, and the bytes that each is said to take."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.errors import PlanError
from gradwire_protocol.gradient_codecs import (
    GRADIENT_CODEC_NAMES,
    GradientCodec,
    encoded_bytes,
    index_bytes,
    matrix_shape,
    parse_compression,
    top_count,
)


@pytest.mark.parametrize(
    ("text", "codec", "canonical"),
    [
        ("none", GradientCodec("none"), "none"),
        (" fp16 ", GradientCodec("fp16"), "fp16"),
        ("bf16()", GradientCodec("bf16"), "bf16"),
        ("int8", GradientCodec("int8"), "int8"),
        ("topk", GradientCodec("topk", density=0.01), "topk(density=0.01)"),
        ("topk(density=1)", GradientCodec("topk", density=1.0), "topk(density=1.0)"),
        ("topk(momentum=.9)", GradientCodec("topk", momentum=0.9), "topk(density=0.01, momentum=0.9)"),
        (
            "topk( warm_up = 100,density=1e-3, momentum=0.5 )",
            GradientCodec("topk", density=0.001, momentum=0.5, warm_up=100),
            "topk(density=0.001, momentum=0.5, warm_up=100)",
        ),
        ("powersgd", GradientCodec("powersgd", rank=4), "powersgd(rank=4)"),
        ("powersgd(rank=2)", GradientCodec("powersgd", rank=2), "powersgd(rank=2)"),
    ],
)
def test_text_means_a_codec(text: str, codec: GradientCodec, canonical: str) -> None:
    assert parse_compression(text) == codec
    assert str(codec) == canonical
    assert codec.lossy == (codec.name != "none")


@given(
    name=st.sampled_from(GRADIENT_CODEC_NAMES),
    density=st.floats(0, 1, exclude_min=True),
    momentum=st.floats(0, 1, exclude_max=True),
    warm_up=st.integers(0, 10**9),
    rank=st.integers(1, 10**9),
)
def test_every_codec_comes_back_from_its_text(
    name: str, density: float, momentum: float, warm_up: int, rank: int
) -> None:
    if name == "topk":
        codec = GradientCodec(name, density=density, momentum=momentum, warm_up=warm_up)
    else:
        codec = GradientCodec(name, rank=rank, warm_up=warm_up) if name == "powersgd" else GradientCodec(name)
    assert parse_compression(str(codec)) == codec


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", ""),
        ("zip", "zip"),
        ("INT8", "INT8"),
        ("topk(", "topk("),
        ("topk)", "topk)"),
        ("topk 0.01", "topk 0.01"),
        ("int8(density=0.1)", "density=0.1"),
        ("topk(rank=4)", "rank=4"),
        ("topk(0.01)", "0.01"),
        ("topk(density)", "nothing"),
        ("topk(density=)", "nothing"),
        ("topk(density=0)", "0"),
        ("topk(density=1.01)", "1.01"),
        ("topk(density=nan)", "nan"),
        ("topk(density=1%)", "1%"),
        ("topk(density=0.1,)", ""),
        ("topk(density=0.1, density=0.2)", "density twice"),
        ("topk(momentum=1)", "1"),
        ("topk(momentum=-0.1)", "-0.1"),
        ("topk(warm_up=-1)", "-1"),
        ("topk(warm_up=1.5)", "1.5"),
        ("topk(warm_up=1000000001)", "1000000001"),
        ("powersgd(rank=0)", "0"),
        ("powersgd(rank=inf)", "inf"),
        ("none\nint8", "none\nint8"),
        ("topk" + " " * 1000 + "()", ("topk" + " " * 1000)[:200]),
    ],
)
def test_other_text_is_refused(text: str, got: str) -> None:
    with pytest.raises(PlanError, match="is not valid") as caught:
        parse_compression(text)
    assert caught.value.got == got
    assert caught.value.expected
    assert "compression=" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "shape", "element_bytes", "expected"),
    [
        ("none", (3, 5), 4, 60),
        ("none", (), 8, 8),
        ("fp16", (3, 5), 4, 4 + 30),
        ("fp16", (3, 5), 8, 4 + 30),
        ("fp16", (3, 5), 2, 30),
        ("bf16", (3, 5), 4, 30),
        ("bf16", (3, 5), 2, 30),
        ("int8", (256,), 4, 4 + 256),
        ("int8", (257,), 2, 8 + 257),
        # 1 % of a million: values, two bytes each for the places, four for each of 16 blocks.
        ("topk", (1000, 1000), 4, 4 * 10_000 + 2 * 10_000 + 4 * 16),
        ("topk", (1000, 1000), 2, 2 * 10_000 + 2 * 10_000 + 4 * 16),
        ("topk(density=0.00001)", (1000, 1000), 4, 8 * 10),
        ("topk", (3,), 8, 8),
        ("topk(density=1)", (3,), 4, 12 + 2 * 3 + 4),
        ("powersgd", (100, 50), 4, 4 * 4 * 150),
        ("powersgd", (100, 5, 10), 8, 8 * 4 * 150),
        ("powersgd", (100, 50), 2, 4 * 4 * 150),
        ("powersgd", (1000,), 4, 4000),
        ("powersgd", (10, 10), 4, 400),
        ("powersgd(rank=1)", (10, 10), 4, 80),
    ],
)
def test_bytes_of_a_tensor(text: str, shape: tuple[int, ...], element_bytes: int, expected: int) -> None:
    assert encoded_bytes(parse_compression(text), shape, element_bytes) == expected


@pytest.mark.parametrize("name", GRADIENT_CODEC_NAMES)
def test_nothing_takes_no_bytes(name: str) -> None:
    assert encoded_bytes(GradientCodec(name), (0, 7), 4) == 0


@given(elements=st.integers(1, 10**9), density=st.floats(1e-6, 1))
def test_a_sparse_codec_sends_its_share(elements: int, density: float) -> None:
    count = top_count(elements, density)
    assert 1 <= count <= elements
    assert abs(count - density * elements) <= 1
    assert index_bytes(elements, count) <= 4 * count


@given(rows=st.integers(0, 3000), columns=st.integers(0, 3000), rank=st.integers(1, 64))
def test_a_matrix_has_factors_where_they_are_half_its_size_at_most(rows: int, columns: int, rank: int) -> None:
    found = matrix_shape((rows, columns), rank)
    pays = rows > 0 and columns > 0 and 2 * rank * (rows + columns) <= rows * columns
    assert found == ((rows, columns) if pays else None)
    assert matrix_shape((rows, 1, columns, 1), rank) == found
    assert matrix_shape((rows * columns,), rank) is None
    if found:
        assert math.prod(found) >= 2 * rank * sum(found)
