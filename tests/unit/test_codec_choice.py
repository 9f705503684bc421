"""Which codec "auto" takes, for what links, loads and stages."""

from __future__ import annotations

import pytest

from gradwire_coordinator.codec_choice import Boundary, Choice, Travelling, choose_codecs, travelling_bytes
from gradwire_coordinator.costs import Rates
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.schedules import one_f_one_b
from gradwire_coordinator.simulator import StageSeconds
from gradwire_protocol.errors import Unreachable
from gradwire_protocol.v1 import tensors_pb2 as pb

CPU = Rates(flops_per_second=5e10, bytes_per_second=1e10)
MEGABIT = 1e6 / 8
# Of a small GPT: 4 × 128 × 256 elements.
ACTIVATION = Travelling(pb.DATA_TYPE_FLOAT32, 2**17, 2**19, has_gradient=True, exact=False)
HALF = Travelling(pb.DATA_TYPE_BFLOAT16, 2**17, 2**18, has_gradient=True, exact=False)
MASK = Travelling(pb.DATA_TYPE_FLOAT32, 2**17, 2**19, has_gradient=False, exact=True)


def link(megabits: float, back: float | None = None, delay: float = 2e-4) -> LinkRate:
    return LinkRate(megabits * MEGABIT, (back or megabits) * MEGABIT, delay)


def choose(
    *links: LinkRate | Unreachable,
    asked: tuple[str, ...] = (),
    values: tuple[Travelling, ...] = (ACTIVATION,),
    seconds: float = 0.1,
    micro_batches: int = 8,
) -> list[Choice]:
    """Choose for stages that take `seconds` a micro-batch each."""
    stages = len(links) + 1
    return choose_codecs(
        asked or ("auto",) * len(links),
        one_f_one_b(stages, micro_batches, 1),
        [StageSeconds(seconds / 3, seconds * 2 / 3)] * stages,
        [CPU] * stages,
        [Boundary(values, link) for link in links],
    )


def codecs(*arguments: LinkRate | Unreachable, **options: object) -> list[str]:
    return [choice.codec for choice in choose(*arguments, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("megabits", "expected"), [(1, "int8"), (10, "int8"), (100, "int8"), (10_000, "none"), (100_000, "none")]
)
def test_the_slower_the_link_the_smaller_the_codec(megabits: float, expected: str) -> None:
    assert codecs(link(megabits)) == [expected]


def test_a_wire_that_hides_under_compute_needs_no_codec() -> None:
    # 42 ms each way for a micro-batch: of a step of long stages that is next to nothing, of short ones nearly all.
    assert codecs(link(100), seconds=5.0) == ["none"]
    assert codecs(link(100), seconds=0.01) == ["int8"]


def test_a_little_time_is_not_worth_a_loss_of_precision() -> None:
    # bf16 saves most of what there is to save; int8 less than the tolerance on top.
    assert codecs(link(1000), seconds=0.03) == ["bf16"]


def test_one_slow_direction_is_enough() -> None:
    assert codecs(link(10_000, back=10)) == ["int8"]


def test_each_boundary_is_judged_by_its_own_link() -> None:
    assert codecs(link(10), link(10_000), link(10)) == ["int8", "none", "int8"]
    # The plan's word stands, and counts for the others.
    choices = choose(link(10), link(10), asked=("none", "auto"))
    assert choices[0] == Choice("none")
    assert choices[1].codec != "none"


def test_two_slow_links_do_not_hide_each_other() -> None:
    assert codecs(link(10), link(10), link(10)) == ["int8"] * 3


def test_what_a_codec_cannot_make_smaller_is_left_alone() -> None:
    assert codecs(link(10), values=(MASK,)) == ["none"]
    # Of a mask and an activation together the activation gains; of bfloat16, int8 only.
    assert codecs(link(10), values=(MASK, ACTIVATION)) == ["int8"]
    assert codecs(link(10), values=(HALF,)) == ["int8"]
    assert codecs(link(10), values=()) == ["none"]


def test_the_reason_names_the_link_and_what_was_expected() -> None:
    (choice,) = choose(link(9.6, delay=0.0213))
    assert choice.reason.startswith("link 9.6 Mbit/s forward, 9.6 back, round trip 21.3 ms; estimate of a step: none ")
    assert "int8" in choice.reason
    unknown = choose(Unreachable("The stage server at 10.0.0.2:7 does not answer"), link(10))
    assert unknown[0] == Choice(
        "none", "the link could not be measured: The stage server at 10.0.0.2:7 does not answer"
    )
    assert unknown[1].codec == "int8"


def test_bytes_under_a_codec() -> None:
    assert [travelling_bytes(ACTIVATION, codec) for codec in ("none", "bf16", "fp16", "int8")] == [
        2**19,
        2**18,
        2**18,
        2**17 + 4 * 512,
    ]
    assert travelling_bytes(MASK, "int8") == 2**19
    assert travelling_bytes(HALF, "bf16") == 2**18
    number = Travelling(0, 1, 8, has_gradient=False, exact=False)
    assert travelling_bytes(number, "int8") == 8
