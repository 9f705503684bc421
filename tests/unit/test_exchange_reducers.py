"""Reducers of every codec: the same bits at all members, nothing lost for good, and as many bytes as they say."""

from __future__ import annotations

import pytest
import torch
from exchange_driver import MemoryGroup, Replicas, Wire, exact_sum, run_members, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_protocol.errors import FrameError
from gradwire_protocol.gradient_codecs import encoded_bytes, parse_compression
from gradwire_stage.exchange.half import decode_fp16, encode_fp16
from gradwire_stage.exchange.reducers import make_reducer

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CODECS = (
    "none",
    "fp16",
    "bf16",
    "int8",
    "topk(density=0.1)",
    "topk(density=0.05, momentum=0.9, warm_up=3)",
    "powersgd(rank=2)",
)
# Of each codec, the error of one step beside the largest sum, for gradients of normal numbers.
LOSSY = {"fp16": 1e-2, "bf16": 4e-2, "int8": 4e-2, "topk(density=0.1)": 2.0, "powersgd(rank=2)": 2.0}
SHAPES = st.lists(
    st.sampled_from([(), (1,), (0,), (2,), (257,), (4, 3), (16, 40), (8, 4, 5), (30, 21), (0, 4)]),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("text", CODECS)
@given(
    replicas=st.sampled_from((1, 2, 3, 5)),
    shapes=SHAPES,
    dtype=st.sampled_from(TYPES),
    magnitude=st.sampled_from((0.0, 1e-30, 1e-4, 1.0, 1e3)),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=25)
def test_all_members_get_the_same_bits(
    text: str, replicas: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    group = Replicas(text, replicas, *shapes)
    generator = torch.Generator().manual_seed(seed)
    again = Replicas(text, replicas, *shapes)
    for step in range(3):
        gradients = [gradient * magnitude for gradient in group.draw(generator, dtype)]
        result = group.reduce(gradients, seed + step)
        assert result.isfinite().all()
        assert same_bits(again.reduce(gradients), result), "the order of progress must not matter"
        if replicas == 1:
            assert same_bits(result, gradients[0])
        for member in group.members:
            first, second = group.reducers[member].state(), again.reducers[member].state()
            assert first.keys() == second.keys()
            assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("replicas", [2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_without_a_codec_it_is_the_sum(dtype: torch.dtype, replicas: int, size: int) -> None:
    group = Replicas("none", replicas, (size,))
    gradients = group.draw(torch.Generator().manual_seed(size), dtype)
    expected = exact_sum(gradients)
    bound = replicas * torch.finfo(dtype).eps * exact_sum([gradient.abs() for gradient in gradients])
    assert bool(((group.reduce(gradients).double() - expected).abs() <= bound).all())
    assert all(not reducer.state() for reducer in group.reducers.values())


def test_integers_are_summed_without_a_codec() -> None:
    group = Replicas("none", 3, (5,))
    gradients = [torch.arange(5) * factor for factor in (1, 10, 100)]
    assert group.reduce(gradients).tolist() == [0, 111, 222, 333, 444]


@pytest.mark.parametrize("text", LOSSY)
@pytest.mark.parametrize("replicas", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_lost_for_good(text: str, replicas: int, dtype: torch.dtype) -> None:
    """What has been delivered and what is kept add up to what was put in: so the error of many steps is that of one."""
    group, forgetful = (Replicas(text, replicas, (24, 40), (7,)) for _ in range(2))
    generator = torch.Generator().manual_seed(replicas)
    mean = torch.randn(group.size, generator=generator, dtype=torch.float64)
    true, delivered, without = (torch.zeros(group.size, dtype=torch.float64) for _ in range(3))
    for _ in range(20):
        gradients = [(mean + draw).to(dtype) for draw in group.draw(generator, torch.float64)]
        true += exact_sum(gradients)
        delivered += group.reduce(gradients).double()
        without += forgetful.reduce(gradients).double()
        forgetful.forget()
    kept = torch.zeros_like(true)
    for reducer in group.reducers.values():
        for name, tensor in reducer.state().items():
            if name.startswith(("residual", "unsent")):
                flat = tensor.double().flatten()[: group.size]
                kept[: len(flat)] += flat
    largest_sum = float(true.abs().amax())
    # Rounding to the gradients' own type, once a step.
    rounding = 1e-6 if dtype != torch.bfloat16 else 1e-2
    assert float((delivered + kept - true).abs().amax()) <= rounding * largest_sum
    if dtype == torch.bfloat16 and text in ("fp16", "bf16"):
        return  # nothing to gain, thus nothing lost
    if dtype != torch.bfloat16:  # whose own rounding would hide it
        assert float((without - true).norm()) > 2 * float((delivered - true).norm())


@pytest.mark.parametrize("text", LOSSY)
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_the_error_of_a_step(text: str, replicas: int) -> None:
    group = Replicas(text, replicas, (24, 40), (7,))
    gradients = group.draw(torch.Generator().manual_seed(0))
    expected = exact_sum(gradients)
    error = (group.reduce(gradients).double() - expected).abs().amax()
    assert float(error) <= LOSSY[text] * float(expected.abs().amax()) + 1e-9
    assert float(error) > 0


@pytest.mark.parametrize("text", CODECS)
def test_a_replica_may_have_nothing(text: str) -> None:
    group = Replicas(text, 3, (24, 40), (7,))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = group.draw(generator)
        gradients[1].zero_()
        group.reduce(gradients)


@pytest.mark.parametrize("text", ["fp16", "bf16", "int8", "topk(density=0.1)"])
@pytest.mark.parametrize("garbage", [torch.zeros(3, dtype=torch.uint8), torch.zeros(50), torch.zeros(2, 2)])
def test_garbage_ends_in_an_error_that_names_the_member(text: str, garbage: torch.Tensor) -> None:
    reducer = make_reducer(parse_compression(text), [torch.Size([100])])
    steps = reducer.all_reduce(MemoryGroup(4, (4, 6), Wire()), torch.ones(100), 0)
    assert next(steps).member == 6
    with pytest.raises(FrameError, match=r"(member|replica) 6 sent"):
        steps.send(garbage)


@pytest.mark.parametrize("text", ["none", "fp16", "bf16", "int8", "powersgd(rank=2)"])
@pytest.mark.parametrize("replicas", [2, 4, 5])
@pytest.mark.parametrize("dtype", TYPES)
def test_bytes_on_the_wire_of_a_ring(text: str, replicas: int, dtype: torch.dtype) -> None:
    shape = (64, 20 * replicas)
    group, codec = Replicas(text, replicas, shape), parse_compression(text)
    group.reduce(group.draw(torch.Generator().manual_seed(0), dtype))
    if text.startswith("powersgd"):
        # Parts of the two factors differ by an element.
        expected, off = encoded_bytes(codec, shape, dtype.itemsize) * 2 * (replicas - 1) / replicas, 32 * replicas
    else:
        expected, off = encoded_bytes(codec, (64 * 20,), dtype.itemsize) * 2 * (replicas - 1), 0
    for member in group.members:
        assert abs(group.wire.bytes_of(member) - expected) <= off


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows_and_is_gone_in_the_next_step(text: str, dtype: torch.dtype, special: float) -> None:
    group = Replicas(text, 3, (24, 40), (7,))
    generator = torch.Generator().manual_seed(0)
    group.reduce(group.draw(generator, dtype))
    gradients = group.draw(generator, dtype)
    gradients[1][5] = special
    gradients[2][-1] = special
    result = group.reduce(gradients)
    if text.startswith("powersgd"):
        assert not result[:-7].isfinite().any()  # a matrix as a whole
        assert result[-7:-1].isfinite().all()
    else:
        assert (~result.isfinite()).nonzero().flatten().tolist() == [5, group.size - 1]
        assert result[5].isnan() if special != special else result[5] == special
    for reducer in group.reducers.values():
        assert all(tensor.isfinite().all() for tensor in reducer.state().values())
    assert group.reduce(group.draw(generator, dtype)).isfinite().all()


def test_fp16_scales_what_has_grown() -> None:
    largest_float = torch.finfo(torch.float32).max
    for elements in (
        torch.tensor([largest_float * 0.999, -1.0]),
        torch.tensor([3e5, -7e4, 1.0, torch.inf, torch.nan]),
        torch.tensor([1e-30, 3e-31]),
        torch.tensor([1e-44, 0.0]),
        torch.zeros(3),
        torch.tensor([torch.nan]),
        torch.tensor([1e300, 1.0], dtype=torch.float64),
    ):
        payload = encode_fp16(elements)
        assert payload.numel() == encoded_bytes(parse_compression("fp16"), elements.shape, 4)
        back = decode_fp16(payload, elements.dtype)
        rounded = elements.float().to(elements.dtype)
        finite = rounded[rounded.isfinite()]
        bound = float(finite.abs().amax()) * 2.0**-11 if len(finite) else 0
        assert torch.allclose(back, rounded, rtol=0, atol=bound, equal_nan=True)
    group = Replicas("fp16", 3, (4,))
    assert group.reduce([torch.full((4,), 60000.0)] * 3).tolist() == pytest.approx([180000.0] * 4, rel=1e-3)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_may_be_written_to_while_messages_are_on_their_way(text: str, dtype: torch.dtype) -> None:
    group = Replicas(text, 3, (24, 40), (7,))
    own = dict(zip(group.members, group.draw(torch.Generator().manual_seed(0), dtype), strict=True))
    results, wire = run_members(
        lambda member: group.reducers[member.own].all_reduce(member, own[member.own], 0), group.members
    )
    for result in results:
        result.div_(3)
    wire.check()


@pytest.mark.parametrize(
    ("text", "strength", "share"), [("int8", 300, 0.5), ("topk(density=0.1)", 10, 0.1), ("powersgd(rank=2)", 30, 0.5)]
)
def test_training_stalls_without_feedback_and_converges_with_it(text: str, strength: float, share: float) -> None:
    """Least squares at two replicas, whose data pull some weights in opposite directions, much more than to the target.

    What they have in common is then always among what a codec leaves out.
    """

    def train(forget: bool) -> float:
        generator = torch.Generator().manual_seed(0)
        group = Replicas(text, 2, (20, 40))
        target, pull = torch.randn(2, group.size, generator=generator)
        pull *= strength * (torch.rand(group.size, generator=generator) < share)
        weights = torch.zeros(group.size)
        for _ in range(100):
            error = weights - target
            weights = weights - 0.03 * group.reduce([error + pull, error - pull])
            if forget:
                group.forget()
        return float((weights - target).norm() / target.norm())

    with_feedback, without = train(forget=False), train(forget=True)
    assert with_feedback < 0.1
    assert without > 0.2
