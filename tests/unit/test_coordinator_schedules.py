"""Schedules as pictures, against the textbook's and torch's order, and their validator."""

from __future__ import annotations

from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules
from torch_orders import texts, torchs

from gradwire_coordinator.placement import Placement, hosted, looped, v_shaped
from gradwire_coordinator.schedules import first_micro_batches, forward_only, gpipe, interleaved_1f1b, one_f_one_b
from gradwire_coordinator.timetable import check_programs, draw
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import Action, format_program, parse_program

stages = st.integers(1, 8)
micro_batches = st.integers(1, 16)


def picture(
    programs: list[list[Action]], count: int, placement: Placement | None = None, *, backward: bool = True
) -> str:
    return draw(programs, check_programs(programs, count, backward=backward, placement=placement))


def test_gpipe_as_a_picture() -> None:
    assert picture(gpipe(3, 4), 4) == dedent("""\
        F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .""")


def test_1f1b_as_a_picture() -> None:
    assert picture(one_f_one_b(3, 4), 4) == dedent("""\
        F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .""")


def test_1f1b_with_a_deeper_warm_up_as_a_picture() -> None:
    assert picture(one_f_one_b(3, 4, extra_warm_up=1), 4) == dedent("""\
        F0 F1 F2 F3 .  B0 .  B1 .  B2 .  B3
        .  F0 F1 F2 B0 F3 B1 .  B2 .  B3 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .""")


def test_interleaved_1f1b_as_a_picture() -> None:
    assert picture(interleaved_1f1b(2, 4, 2), 4, looped(2, 2)) == dedent("""\
        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 .   2B2 .   2B3 0B2 0B3
        .   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 .""")


def test_forward_only_as_a_picture() -> None:
    assert picture(forward_only(2, 3), 3, backward=False) == dedent("""\
        F0 F1 F2 .
        .  F0 F1 F2""")
    around, back = looped(2, 2), v_shaped(2)
    assert picture(forward_only(2, 4, around), 4, around, backward=False) == dedent("""\
        0F0 0F1 2F0 2F1 0F2 0F3 2F2 2F3 .
        .   1F0 1F1 3F0 3F1 1F2 1F3 3F2 3F3""")
    assert picture(forward_only(2, 2, back), 2, back, backward=False) == dedent("""\
        0F0 0F1 .   .   3F0 3F1
        .   1F0 1F1 2F0 2F1 .""")


def test_1f1b_is_the_textbooks_order() -> None:
    """Narayanan et al. 2021, figure 4: four stages, eight micro-batches."""
    assert [format_program(program) for program in one_f_one_b(4, 8)] == [
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7",
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7",
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7",
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7",
    ]


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_orders_are_those_of_torch(p: int, rounds: int) -> None:
    m = p * rounds
    assert texts(gpipe(p, m)) == torchs(torch_schedules.ScheduleGPipe, p, m)
    # Of the last rank torch prints forwards that are one too high, and runs the right ones.
    assert texts(one_f_one_b(p, m))[:-1] == torchs(torch_schedules.Schedule1F1B, p, m)[:-1]
    for v in (2, 3, 4):
        assert texts(interleaved_1f1b(p, m, v)) == torchs(torch_schedules.ScheduleInterleaved1F1B, p, m, v)


@pytest.mark.parametrize(("p", "m", "v"), [(4, 10, 2), (4, 3, 2), (3, 8, 3), (8, 5, 2)])
def test_interleaved_rounds_need_not_be_as_long_as_there_are_servers(p: int, m: int, v: int) -> None:
    assert texts(interleaved_1f1b(p, m, v)) == torchs(torch_schedules.ScheduleInterleaved1F1B, p, m, v)


@pytest.mark.parametrize("p", range(1, 17))
def test_every_schedule_is_complete_in_order_and_free_of_deadlock(p: int) -> None:
    for m in range(1, 33):
        for extra in (0, 1, 3):
            check_programs(one_f_one_b(p, m, extra), m, backward=True)
        check_programs(gpipe(p, m), m, backward=True)
        check_programs(forward_only(p, m), m, backward=False)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 16), st.integers(1, 32), st.integers(1, 4))
def test_so_it_is_with_virtual_stages(p: int, m: int, v: int) -> None:
    """Micro-batches that are no multiple of the servers, or fewer, included."""
    programs, placement = interleaved_1f1b(p, m, v), looped(p, v)
    check_programs(programs, m, backward=True, placement=placement)
    fewer = max(1, m // 2)
    check_programs(first_micro_batches(programs, fewer), fewer, backward=True, placement=placement)
    check_programs(forward_only(p, m, placement), m, backward=False, placement=placement)
    check_programs(forward_only(p, m, v_shaped(p)), m, backward=False, placement=v_shaped(p))


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("v", [1, 2, 4])
def test_virtual_stages_divide_the_bubble(p: int, v: int) -> None:
    """Narayanan et al. 2021, section 2.2: (p − 1) / v micro-batches' time, where m is a multiple of p."""
    m = 2 * p
    timetable = check_programs(interleaved_1f1b(p, m, v), m, backward=True, placement=looped(p, v))
    assert 1 + max(timetable.values()) - 2 * m * v == 2 * (p - 1)  # of slots that are a v-th as long


@given(stages, micro_batches)
def test_schedules_reach_the_theoretical_bubble(p: int, m: int) -> None:
    for programs in (gpipe(p, m), one_f_one_b(p, m), one_f_one_b(p, m, 1)):
        slots = 1 + max(check_programs(programs, m, backward=True).values())
        assert slots == 2 * (m + p - 1)


@given(stages, micro_batches, st.integers(0, 2))
def test_1f1b_bounds_the_micro_batches_that_a_stage_holds(p: int, m: int, extra: int) -> None:
    for stage, program in enumerate(one_f_one_b(p, m, extra)):
        held = peak = 0
        for action in program:
            held += 1 if action.kind == "F" else -1
            peak = max(peak, held)
        assert peak <= p - stage + (extra if stage < p - 1 else 0)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (["0F0 0B0"], "complete: 0F1 is missing"),
        (["0F0 0F1 0B0"], "complete: 0B1 is missing"),
        (["0F0 0F1 0B0 0I1"], "complete: 0W1 is missing"),
        (["0F0 0F1 0B1 0B0"], "in order: 0B1 comes before 0B0"),  # sums would have another order
        (["0F1 0F0 0B0 0B1"], "in order: 0F1 comes before 0F0"),
        (["0F0 0F1 0I1 0I0 0W0 0W1"], "in order: 0I1 comes before 0I0"),
        (["0F0 0F1 0I0 0B1 0W0"], "in order: 0B1 comes before 0W0"),  # as above
        (["0F0 0F1 0B0 0B1 0B1"], "0B1 comes twice"),
        (["0F0 0F1 0B0 0B1 0W1"], "0B1 is all of 0I1 and 0W1"),
        (["0F0 0F1 0W0 0I0 0B1"], "in order: 0W0 comes before 0I0"),
        (["0B0 0F0 0F1 0B1"], "in order: 0B0 comes before 0F0"),
        (["0F0 0F1 0B0 UPDATE 0B1"], "UPDATE does not belong"),  # before the last gradient
        (["0F0 0F1 0B0 0B1 1F0"], "1F0 does not belong"),  # another server's
        (["0F0 0F1 0B0 0B1 0F2"], "0F2 does not belong"),  # no such micro-batch
        (["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"], "server 0 at 0B0, which waits for 1B0; server 1 at 1F1.* for 0F1"),
    ],
)
def test_the_validator_refuses_and_names_the_action(programs: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_programs([parse_program(text) for text in programs], 2, backward=True)


def test_the_validator_knows_where_stages_are() -> None:
    programs = [parse_program("0F0 2F0 2B0 0B0"), parse_program("1F0 1B0")]
    check_programs(programs, 1, backward=True, placement=(0, 1, 0))
    with pytest.raises(PlanError, match="server 0 is not its own: 2F0 does not belong"):
        check_programs(programs, 1, backward=True, placement=(0, 1, 1))
    with pytest.raises(PlanError, match="One program a server"):
        check_programs(programs, 1, backward=True, placement=(0, 1, 2))
    with pytest.raises(PlanError, match="does not belong"):  # of forwards only
        check_programs(programs, 1, backward=False, placement=(0, 1, 0))
    with pytest.raises(PlanError, match=r"server 0 at 0F0, which waits|server 0 at 2F0, which waits for 1F0"):
        check_programs([parse_program("2F0 0F0 2B0 0B0"), programs[1]], 1, backward=True, placement=(0, 1, 0))


def test_actions_of_the_whole_step_may_follow() -> None:
    check_programs([parse_program("0F0 0F1 0B0 0B1 REDUCE NORM UPDATE")], 2, backward=True)


@pytest.mark.parametrize(("p", "m", "extra"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_nonsense_is_refused(p: int, m: int, extra: int) -> None:
    with pytest.raises(PlanError):
        one_f_one_b(p, m, extra)


def test_placements() -> None:
    assert looped(3, 2) == (0, 1, 2, 0, 1, 2)
    assert v_shaped(3) == (0, 1, 2, 2, 1, 0)
    assert hosted(v_shaped(2)) == [[0, 3], [1, 2]]
    for wrong in ((), (0, 2)):
        with pytest.raises(PlanError, match="hosts no stage"):
            hosted(wrong)
    with pytest.raises(PlanError, match="at least one server"):
        looped(0)
