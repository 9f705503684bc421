"""Schedules as pictures, against the textbook's order, and their validator."""

from __future__ import annotations

from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_coordinator.schedules import forward_only, gpipe, one_f_one_b
from gradwire_coordinator.timetable import check_programs, draw
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import Action, format_program, parse_program

stages = st.integers(1, 8)
micro_batches = st.integers(1, 16)


def picture(programs: list[list[Action]], count: int, *, backward: bool = True) -> str:
    return draw(programs, check_programs(programs, count, backward=backward))


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


def test_forward_only_as_a_picture() -> None:
    assert picture(forward_only(2, 3), 3, backward=False) == dedent("""\
        F0 F1 F2 .
        .  F0 F1 F2""")


def test_1f1b_is_the_textbooks_order() -> None:
    """Narayanan et al. 2021, figure 4: four stages, eight micro-batches."""
    assert [format_program(program) for program in one_f_one_b(4, 8)] == [
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7",
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7",
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7",
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7",
    ]


@given(stages, micro_batches, st.integers(0, 3))
def test_every_schedule_is_complete_in_order_and_free_of_deadlock(p: int, m: int, extra: int) -> None:
    check_programs(gpipe(p, m), m, backward=True)
    check_programs(one_f_one_b(p, m, extra), m, backward=True)
    check_programs(forward_only(p, m), m, backward=False)


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
    ("texts", "message"),
    [
        (["0F0 0B0"], "complete"),  # micro-batch 1 is missing
        (["0F0 0F1 0B1 0B0"], "complete"),  # backwards out of order: sums would have another order
        (["0F0 0F1 0B0 0B1 0B1"], "complete"),  # one twice
        (["0F0 0F1 0B0 UPDATE 0B1"], "belong"),  # updates before the last gradient
        (["0F0 0F1 0B0 0B1 1F0"], "belong"),  # another stage's
        (["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"], "deadlock"),  # 0B0 waits for 1B0, that for 1F1, that for 0F1
        (["0B0 0F0 0F1 0B1"], "deadlock"),  # a backward before its forward
    ],
)
def test_the_validator_refuses(texts: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_programs([parse_program(text) for text in texts], 2, backward=True)


def test_actions_of_the_whole_step_may_follow() -> None:
    check_programs([parse_program("0F0 0F1 0B0 0B1 REDUCE NORM UPDATE")], 2, backward=True)


@pytest.mark.parametrize(("p", "m", "extra"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_nonsense_is_refused(p: int, m: int, extra: int) -> None:
    with pytest.raises(PlanError):
        one_f_one_b(p, m, extra)
