"""Schedules with backwards in two parts: as pictures, against torch's order, and the paper's bubbles and memory."""

from __future__ import annotations

from textwrap import dedent

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch_orders import texts, torchs

from gradwire_coordinator.placement import looped, v_shaped
from gradwire_coordinator.schedules import first_micro_batches, one_f_one_b
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts, simulate
from gradwire_coordinator.timetable import check_programs, draw
from gradwire_coordinator.zero_bubble import join_where_nobody_waits, zb_h1, zb_v
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, format_program


def equal_costs(placement: tuple[int, ...], parts: int = 1) -> StepCosts:
    """F, I and W take a second each, of a stage that is a `parts`-th of a server; activations stay until W."""
    count = len(placement)
    return StepCosts(
        placement,
        (StageSeconds.in_parts(1 / parts, 1 / parts, 1 / parts),) * count,
        (LinkSeconds(0, 0, 0),) * (count - 1),
        (StageBytes(2 // parts, 2 // parts),) * count,
    )


def test_zb_h1_as_a_picture() -> None:
    programs = zb_h1(3, 4)
    assert draw(programs, check_programs(programs, 4, backward=True)) == dedent("""\
        F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3""")


def test_zb_v_as_a_picture() -> None:
    programs, there_and_back = zb_v(2, 4), v_shaped(2)
    assert draw(programs, check_programs(programs, 4, backward=True, placement=there_and_back)) == dedent("""\
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3 .
        .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3""")


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_orders_are_those_of_torch(p: int, rounds: int) -> None:
    m = p * rounds
    assert texts(zb_h1(p, m)) == torchs(torch_schedules.ScheduleInterleavedZeroBubble, p, m)
    assert texts(zb_v(p, m)) == torchs(torch_schedules.ScheduleZBVZeroBubble, p, m, 2)


@pytest.mark.parametrize("p", range(1, 17))
def test_every_schedule_is_complete_in_order_and_free_of_deadlock(p: int) -> None:
    for m in range(1, 33):
        check_programs(zb_h1(p, m), m, backward=True)
        check_programs(zb_v(p, m), m, backward=True, placement=v_shaped(p))
    for programs, placement in ((zb_h1(p, 32), looped(p)), (zb_v(p, 32), v_shaped(p))):
        check_programs(join_where_nobody_waits(programs), 32, backward=True, placement=placement)
        for m in (1, p, 31):
            check_programs(first_micro_batches(programs, m), m, backward=True, placement=placement)


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_bubbles_and_memory_are_those_of_the_paper(p: int) -> None:
    """Qi et al. 2024, table 2, for equal F, I and W: 1F1B's bubble, a third of it, and only the fill."""
    m = 3 * p
    costs, halves = equal_costs(looped(p)), equal_costs(v_shaped(p), parts=2)
    plain, h1 = simulate(one_f_one_b(p, m), costs), simulate(zb_h1(p, m), costs)
    assert plain.seconds - 3 * m == pytest.approx(3 * (p - 1))
    assert h1.seconds - 3 * m == pytest.approx(p - 1)
    v = simulate(zb_v(p, m), halves)
    assert v.seconds - 3 * m == pytest.approx((p - 1) / 2)
    assert plain.bubble_ratio == pytest.approx((p - 1) / (m + p - 1))
    # Nobody holds more than the first stage of 1F1B, even if W needs all that I does.
    assert max(plain.peak_bytes) == 2 * p
    assert h1.peak_bytes == (2 * p,) * p
    assert max(v.peak_bytes) == 2 * p


def test_the_bubble_of_zb_v_vanishes_in_the_limit() -> None:
    ratios = [simulate(zb_v(4, m), equal_costs(v_shaped(4), parts=2)).bubble_ratio for m in (8, 80, 800)]
    assert ratios == pytest.approx([1.5 / (3 * m + 1.5) for m in (8, 80, 800)])


def test_backwards_that_nobody_waits_for_are_whole() -> None:
    joined = join_where_nobody_waits(zb_h1(2, 3))
    assert [format_program(program) for program in joined] == [
        "0F0 0F1 0B0 0F2 0B1 0B2",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]
    kinds = {action.kind for action in join_where_nobody_waits(zb_v(3, 7))[0] if action.stage == 0}
    assert BACKWARD in kinds
    assert not kinds & {INPUT_GRADIENT, WEIGHT_GRADIENT}


@pytest.mark.parametrize("make", [zb_h1, zb_v])
def test_nonsense_is_refused(make) -> None:
    with pytest.raises(PlanError):
        make(0, 1)
    with pytest.raises(PlanError):
        make(1, 0)
