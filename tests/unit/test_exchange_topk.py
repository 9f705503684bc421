"""topk: which elements it finds, when it sends how many, and how they are packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exchange_driver import Replicas
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_protocol.errors import FrameError
from gradwire_protocol.gradient_codecs import encoded_bytes, parse_compression, top_count
from gradwire_stage.exchange import sparse
from gradwire_stage.exchange.topk import largest

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@given(size=st.integers(1, 3000), density=st.sampled_from((0.001, 0.01, 0.1, 0.5, 1.0)), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_the_largest_elements_are_found(size: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randn(-(-size // 16) * 16, generator=generator)
    elements[size:] = 0
    elements[torch.rand(len(elements), generator=generator) < 0.3] = 0
    count = top_count(size, density)
    places = largest(elements, count, seed % 7)
    assert bool((places[1:] > places[:-1]).all())
    expected = min(count, int((elements != 0).sum()))
    if size <= 256 / density:  # the sample is everything
        assert len(places) == expected
        assert float(elements[places].abs().sum()) == pytest.approx(float(elements.abs().topk(expected).values.sum()))
    assert len(places) <= expected
    assert bool((elements[places] != 0).all())


@pytest.mark.parametrize("make", [torch.randn, torch.rand, lambda size: torch.randn(size).pow(9), torch.ones])
def test_a_sample_finds_nearly_as_many_as_wanted(make: Callable[[int], torch.Tensor]) -> None:
    torch.manual_seed(0)
    elements = make(2**18)
    for density in (0.001, 0.01, 0.1):
        count = top_count(len(elements), density)
        for step in range(3):
            places = largest(elements, count, step)
            assert 0.9 * count <= len(places) <= count
            # None much smaller than those that should have come.
            assert float(elements[places].abs().amin()) >= 0.9 * float(elements.abs().topk(count).values.amin())


def test_topk_sends_more_in_the_beginning() -> None:
    group = Replicas("topk(density=0.01, warm_up=4)", 2, (1000,))
    generator = torch.Generator().manual_seed(0)
    sent = []
    for _ in range(6):
        gradients = group.draw(generator)
        sent.append(int((group.reduce(gradients) != 0).sum()))
    assert sent[0] > sent[1] > sent[2] > sent[3]
    assert 250 <= sent[0] <= 500
    assert 10 <= sent[4] <= 20
    assert 10 <= sent[5] <= 20


def test_topk_corrects_momentum_and_masks_it() -> None:
    """Written out as in the paper, for one replica of two whose other one has nothing."""
    group = Replicas("topk(density=0.1, momentum=0.5)", 2, (20,))
    generator = torch.Generator().manual_seed(3)
    velocity, unsent = torch.zeros(20), torch.zeros(20)
    for _ in range(8):
        gradient = torch.randn(20, generator=generator)
        velocity = 0.5 * velocity + gradient
        unsent = unsent + velocity
        sent = torch.zeros(20, dtype=torch.bool)
        sent[unsent.abs().topk(2).indices] = True
        result = group.reduce([gradient, torch.zeros(20)])
        assert torch.equal(result, torch.where(sent, unsent, 0))
        velocity[sent], unsent[sent] = 0, 0


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [50, 70_000])
def test_bytes_on_the_wire_of_topk(replicas: int, dtype: torch.dtype, size: int) -> None:
    text = "topk(density=0.1)"
    group = Replicas(text, replicas, (size,))
    group.reduce(group.draw(torch.Generator().manual_seed(0), dtype))
    bound = (replicas - 1) * encoded_bytes(parse_compression(text), (size,), dtype.itemsize)
    for member in group.members:
        assert 0.9 * bound <= group.wire.bytes_of(member) <= bound


@given(
    elements=st.sampled_from((1, 5, 3000, 65536, 65537, 200_000)),
    density=st.sampled_from((0.0, 1e-5, 1e-4, 0.01, 1.0)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=25)
def test_sparse_payloads_come_back(elements: int, density: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = (torch.rand(elements, generator=generator) < density).nonzero().view(-1)
    values = torch.randn(len(places), generator=generator).to(dtype)
    payload = sparse.pack(places, values, elements)
    back = sparse.unpack(payload, elements, elements, dtype, "replica 1")
    assert torch.equal(back[0], places)
    assert torch.equal(back[1], values)


@pytest.mark.parametrize("elements", [100, 100_000])
def test_malformed_sparse_payloads_are_refused(elements: int) -> None:
    places = torch.arange(0, elements, 5)
    count = len(places)
    good = sparse.pack(places, torch.ones(count), elements)

    def refuse(payload: torch.Tensor, most: int = count) -> None:
        with pytest.raises(FrameError, match="that replica 7 sent do not fit"):
            sparse.unpack(payload, elements, most, torch.float32, "replica 7")

    refuse(good, count - 1)
    refuse(good[:-1])
    refuse(torch.cat([good, good[:1]]))
    refuse(good.view(-1, 1))
    refuse(good.to(torch.float32))
    refuse(sparse.pack(places.flip(0), torch.ones(count), elements))
    refuse(sparse.pack(torch.full((count,), 3), torch.ones(count), elements))
    outside = sparse.pack(places.clone(), torch.ones(count), elements)
    outside[:4].view(torch.int32).fill_(-1)
    refuse(outside)
    outside[:4].view(torch.int32).fill_(2**30)
    refuse(outside)
