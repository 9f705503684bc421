"""Schedules made for given costs: valid, at least as good as the named ones, within memory, and near the bound."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_costs import step_costs

from gradwire_coordinator.auto_schedule import ScheduleChoice, best_schedule, warm_up_depth
from gradwire_coordinator.list_scheduler import Rules, list_schedule
from gradwire_coordinator.lower_bound import lower_bound
from gradwire_coordinator.placement import Placement, looped, v_shaped
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts, simulate
from gradwire_coordinator.timetable import check_programs, draw
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import INPUT_GRADIENT, format_program

NO_LINK = LinkSeconds(0.0, 0.0, 0.0)
# Of the GPT on a CPU: two parts take 2 % longer than the whole.
GPT = StageSeconds(forward=68.0, backward=131.0, input_gradient=78.0, weight_gradient=56.0)
rules = st.builds(
    Rules,
    ahead=st.sampled_from([0, 1, 4, math.inf]),
    split_last=st.sampled_from([0, 1, 4, math.inf]),
    waiting=st.sampled_from([0, 1, 4, math.inf]),
    patience=st.sampled_from([0.0, 0.5, 1.0]),
    alternate=st.booleans(),
    deep=st.booleans(),
)


def equal(placement: Placement, stage: StageSeconds, link: LinkSeconds = NO_LINK) -> StepCosts:
    count = len(placement)
    return StepCosts(placement, (stage,) * count, (link,) * (count - 1), (StageBytes(10, 10),) * count)


def ratio(choice: ScheduleChoice, costs: StepCosts, micro_batches: int) -> float:
    return lower_bound(costs, micro_batches) / choice.best.simulation.seconds


@settings(max_examples=200, deadline=None)
@given(step_costs(), st.integers(1, 10), rules)
def test_whatever_the_rules_a_list_schedule_is_valid(costs: StepCosts, micro_batches: int, of: Rules) -> None:
    programs = list_schedule(costs, micro_batches, of)
    assert programs is not None
    check_programs(programs, micro_batches, backward=True, placement=costs.placement)
    seconds = simulate(costs.whole_step(programs), costs).seconds
    assert seconds >= lower_bound(costs, micro_batches) * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(step_costs(), st.integers(1, 10), rules, st.integers(1, 3))
def test_limits_on_memory_hold_and_never_end_in_a_standstill(
    costs: StepCosts, micro_batches: int, of: Rules, times: int
) -> None:
    """Where there is room for one micro-batch on all stages of a server."""
    limits = [0] * (1 + max(costs.placement))
    for stage, server in enumerate(costs.placement):
        limits[server] += times * max(costs.held[stage].activations, costs.held[stage].for_weights)
    programs = list_schedule(costs, micro_batches, of, limits)
    assert programs is not None
    check_programs(programs, micro_batches, backward=True, placement=costs.placement)
    peaks = simulate(programs, costs).peak_bytes
    assert all(peak <= limit for peak, limit in zip(peaks, limits, strict=True))


@settings(max_examples=15, deadline=None)
@given(step_costs(most=4), st.integers(1, 8), st.integers(0, 3))
def test_auto_is_valid_and_at_least_as_good_as_the_best_that_has_a_name(
    costs: StepCosts, micro_batches: int, tight: int
) -> None:
    limits = None
    if tight:
        limits = [0] * (1 + max(costs.placement))
        for stage, server in enumerate(costs.placement):
            limits[server] += tight * costs.held[stage].activations
    choice = best_schedule(costs, micro_batches, limits)
    best = choice.best
    check_programs(best.programs, micro_batches, backward=True, placement=costs.placement)
    assert best.simulation == simulate(costs.whole_step(best.programs), costs)
    assert best.simulation.seconds >= lower_bound(costs, micro_batches) * (1 - 1e-9)
    for candidate in choice.compared.values():
        assert not candidate.fits or best.simulation.seconds <= candidate.simulation.seconds * (1 + 1e-8), (
            candidate.name
        )
    if limits is not None:
        assert all(peak <= limit for peak, limit in zip(best.simulation.peak_bytes, limits, strict=True))


@settings(max_examples=20, deadline=None)
@given(step_costs(most=4), st.integers(1, 8))
def test_backwards_that_must_stay_whole_do(costs: StepCosts, micro_batches: int) -> None:
    choice = best_schedule(costs, micro_batches, splits=False)
    assert choice.best.split_backwards == 0
    assert choice.best.simulation.seconds >= lower_bound(costs, micro_batches, splits=False) * (1 - 1e-9)


@pytest.mark.parametrize("stages", [4, 8])
@pytest.mark.parametrize("link", [NO_LINK, LinkSeconds(0.1, 0.1, 0.4)])
def test_sleeping_stages_are_within_five_percent_of_the_bound(stages: int, link: LinkSeconds) -> None:
    """5 ms forward, 10 ms backward, 16 micro-batches; links of tenths of a millisecond."""
    for placement, part in ((looped(stages), 1.0), (looped(stages, 2), 0.5), (v_shaped(stages), 0.5)):
        costs = equal(placement, StageSeconds.in_parts(5.0 * part, 5.0 * part, 5.0 * part), link)
        choice = best_schedule(costs, 16)
        assert ratio(choice, costs, 16) >= 0.98
        named = [found for name, found in choice.compared.items() if name != "auto"]
        assert choice.best.simulation.seconds <= min(found.simulation.seconds for found in named)


def test_two_stages_of_a_gpt() -> None:
    costs = equal(looped(2), GPT, LinkSeconds(1.0, 1.0, 0.5))
    choice = best_schedule(costs, 8)
    assert ratio(choice, costs, 8) >= 0.98
    # Only the last backwards fill a bubble.
    assert 1 <= choice.best.split_backwards <= 4
    assert choice.best.name == "auto"
    assert choice.reason.startswith("auto takes 1.67e+03 s, zb-h1 1.7")


def test_what_is_split_fills_a_bubble() -> None:
    """Making any one of them whole, after the weight gradients before it, costs time."""
    costs = equal(looped(3), GPT, LinkSeconds(1.0, 1.0, 0.5))
    best = best_schedule(costs, 8).best
    assert best.split_backwards
    for server, program in enumerate(best.programs):
        for place, action in enumerate(program):
            if action.kind != INPUT_GRADIENT:
                continue
            after = [
                other for other in program[place:] if other.kind == "W" and other.micro_batch <= action.micro_batch
            ]
            behind = [other for other in program[place + 1 :] if other not in after]
            whole = [*program[:place], *after[:-1], action._replace(kind="B"), *behind]
            programs = [*best.programs[:server], whole, *best.programs[server + 1 :]]
            check_programs(programs, 8, backward=True)
            assert simulate(programs, costs).seconds > best.simulation.seconds


def test_the_depth_of_the_warm_up_follows_the_link() -> None:
    stage = StageSeconds(forward=5.0, backward=10.0)
    depths = [warm_up_depth(equal(looped(4), stage, LinkSeconds(0.0, 0.0, delay)), 16) for delay in (0.0, 0.5, 10.0)]
    assert depths == [0, 1, 4]
    # Stage 0 holds four micro-batches of ten bytes, and two more.
    assert warm_up_depth(equal(looped(4), stage, LinkSeconds(0.0, 0.0, 10.0)), 16, [60.0] * 4) == 2
    assert warm_up_depth(equal(looped(1), stage), 16) == 0


def test_one_stage_needs_no_split_and_no_search() -> None:
    choice = best_schedule(equal(looped(1), GPT), 4)
    assert choice.best.name == "1f1b"
    assert choice.reason == "1f1b takes 796 s; nothing faster was found"


def test_a_made_schedule_as_a_picture() -> None:
    costs = equal(looped(3), StageSeconds.in_parts(1.0, 1.0, 1.0))
    programs = list_schedule(costs, 4, Rules(ahead=0, split_last=math.inf, waiting=3))
    assert programs is not None
    assert draw(programs, check_programs(programs, 4, backward=True)) == dedent("""\
        F0 F1 F2 .  .  I0 F3 I1 W0 I2 W1 I3 W2 W3
        .  F0 F1 .  I0 F2 I1 F3 I2 W0 I3 W1 W2 W3
        .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3""")


def test_a_tight_limit_is_kept_and_a_tighter_one_refused_with_what_is_missing() -> None:
    costs = equal(looped(4), GPT)
    roomy = best_schedule(costs, 8)
    assert max(roomy.best.simulation.peak_bytes) > 40
    tight = best_schedule(costs, 8, [40.0, 30.0, 20.0, 10.0])
    assert tight.best.simulation.peak_bytes <= (40, 30, 20, 10)
    assert tight.best.simulation.seconds > roomy.best.simulation.seconds
    assert not tight.compared["gpipe"].fits
    # One micro-batch at a time: no schedule of the literature is so lean.
    leanest = best_schedule(costs, 8, [10.0] * 4)
    assert leanest.best.name == "auto"
    assert "no named schedule fits in memory" in leanest.reason
    assert leanest.best.simulation.peak_bytes == (10,) * 4
    with pytest.raises(PlanError, match=r"fit on server 2.*at most 7 bytes.*10 bytes: 3 too many.*recompute"):
        best_schedule(costs, 8, [10.0, 10.0, 7.0, 10.0])


def test_a_stage_without_weights_has_nothing_to_split() -> None:
    costs = equal(looped(3), StageSeconds.in_parts(1.0, 1.0, 1.0))
    costs = replace(costs, stages=(*costs.stages[:2], StageSeconds.in_parts(2.0, 1.0, 0.0)))
    choice = best_schedule(costs, 8, [30.0, 30.0, 30.0])
    assert choice.best.name == "auto"
    kinds = [{action.kind for action in program} for program in choice.best.programs]
    assert kinds[2] == {"F", "B"}
    assert choice.best.simulation.seconds <= choice.compared["zb-h1"].simulation.seconds
    assert choice.compared["zb-h1"].split_backwards > choice.best.split_backwards


def test_the_same_costs_give_the_same_programs() -> None:
    costs = equal(v_shaped(3), GPT, LinkSeconds(1.0, 2.0, 0.5))
    first, second = (best_schedule(costs, 7).best.programs for _ in range(2))
    assert list(map(format_program, first)) == list(map(format_program, second))


def test_many_stages_and_micro_batches_take_seconds() -> None:
    start = time.monotonic()
    costs = equal(looped(16, 4), StageSeconds(1.0, 1.94, 1.2, 0.8), LinkSeconds(0.01, 0.01, 0.02))
    choice = best_schedule(costs, 32)
    assert ratio(choice, costs, 32) >= 0.95
    assert time.monotonic() - start < 30


def test_of_very_many_micro_batches_only_named_schedules_are_compared() -> None:
    choice = best_schedule(equal(looped(2), GPT), 300)
    assert choice.best.name in choice.compared
    assert "auto" not in choice.compared
    # Unless none of them fits, or none has these places.
    assert best_schedule(equal((0, 0, 1), GPT), 150).best.name == "auto"
