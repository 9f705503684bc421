"""No schedule is faster than the bound, and some reach it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_costs import step_costs

from gradwire_coordinator.lower_bound import lower_bound
from gradwire_coordinator.named_schedules import named_programs
from gradwire_coordinator.placement import looped
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts, simulate

NO_LINK = LinkSeconds(0.0, 0.0, 0.0)


def equal(stages: int, link: LinkSeconds = NO_LINK) -> StepCosts:
    return StepCosts(
        looped(stages),
        (StageSeconds.in_parts(1.0, 1.0, 1.0),) * stages,
        (link,) * (stages - 1),
        (StageBytes(1, 1),) * stages,
    )


@settings(max_examples=200, deadline=None)
@given(step_costs(), st.integers(1, 12))
def test_no_schedule_is_faster(costs: StepCosts, micro_batches: int) -> None:
    in_parts, whole = (lower_bound(costs, micro_batches, splits=splits) for splits in (True, False))
    assert in_parts <= whole * (1 + 1e-9)
    for name, programs in named_programs(costs.placement, micro_batches).items():
        seconds = simulate(costs.whole_step(programs), costs).seconds
        assert seconds * (1 + 1e-9) >= (in_parts if name.startswith("zb") else whole), name


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 8), (4, 16), (8, 16)])
def test_what_the_textbooks_reach(stages: int, micro_batches: int) -> None:
    costs = equal(stages)
    programs = named_programs(costs.placement, micro_batches)
    whole = 3 * (micro_batches + stages - 1)
    assert lower_bound(costs, micro_batches, splits=False) == pytest.approx(whole)
    assert simulate(programs["1f1b"], costs).seconds == pytest.approx(whole)
    in_parts = 3 * micro_batches + stages - 1
    assert lower_bound(costs, micro_batches) == pytest.approx(in_parts)
    assert simulate(programs["zb-h1"], costs).seconds == pytest.approx(in_parts)


def test_one_micro_batch_goes_all_the_way_there_and_back() -> None:
    costs = equal(3, LinkSeconds(0.5, 0.25, 1.0))
    there_and_back = 3 * 3 - 2 + 2 * (0.5 + 0.25 + 2 * 1.0)  # W of two stages runs while gradients go on
    assert lower_bound(costs, 1) == pytest.approx(there_and_back)
    assert lower_bound(costs, 1, splits=False) == pytest.approx(there_and_back + 2)
