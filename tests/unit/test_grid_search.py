"""Which grid is chosen out of all that can be planned, and why."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import summary
from rich.console import Console

from gradwire.cli.grid_view import grid_view
from gradwire.grid_search import possible_grids, search_grids
from gradwire.plan import Plan
from gradwire.run_plan import RunPlan
from gradwire_protocol.errors import PlanError


def planned(seconds: float, *, fits: bool = True) -> RunPlan:
    plan = RunPlan.from_proto(summary())
    return dataclasses.replace(
        plan,
        predicted=dataclasses.replace(plan.predicted, seconds=seconds),
        candidates=tuple(dataclasses.replace(item, fits=fits) for item in plan.candidates),
    )


@given(st.integers(1, 64))
def test_every_grid_takes_more_than_half_of_the_servers_or_one(servers: int) -> None:
    grids = list(possible_grids(servers))
    assert len(grids) == len(set(grids))
    assert all(servers / 2 < math.prod(grid) <= servers or grid == (1, 1, 1) for grid in grids)
    for stages in range(1, servers + 1):
        rest = servers // stages
        if stages * rest > servers / 2:
            assert (stages, rest, 1) in grids
            assert (stages, 1, rest) in grids


def test_the_fastest_that_fits_is_chosen() -> None:
    times = {(2, 1, 1): 0.5, (1, 2, 1): 0.2, (1, 1, 2): 0.4, (1, 1, 1): 0.9}

    def plan(asked: Plan) -> RunPlan:
        grid = (asked.stages, asked.replicas, asked.tensor)
        return planned(times[grid], fits=grid != (1, 2, 1))

    found = search_grids(Plan(), 2, plan)
    assert (found.chosen.stages, found.chosen.replicas, found.chosen.tensor) == (1, 1, 2)
    assert found.plan.predicted.seconds == 0.4
    assert found.reason.startswith("1 × 1 × 2 (stages × replicas × tensor) is expected to take 400 ms a step")
    assert "the next, 2 × 1 × 1, takes 25% longer" in found.reason
    assert [grid.reason for grid in found.grids if not grid.fits] == ["more memory than there is"]
    assert found.to_record()["grids"][0] == {
        "stages": 1,
        "replicas": 1,
        "tensor": 2,
        "seconds": 0.4,
        "bubble": found.plan.predicted.bubble,
        "peak_bytes": found.chosen.peak_bytes,
        "traffic_bytes": found.chosen.traffic_bytes,
        "fits": True,
        "reason": "",
    }


def test_of_equally_fast_ones_the_one_with_fewer_servers_is_chosen() -> None:
    found = search_grids(
        Plan(), 2, lambda asked: planned(0.3 + (asked.stages * asked.replicas * asked.tensor == 1) * 1e-3)
    )
    assert found.chosen.servers == 1
    assert found.reason.endswith("takes as long, but 2 servers")


def test_what_cannot_be_planned_says_why() -> None:
    def plan(asked: Plan) -> RunPlan:
        if asked.tensor > 1:
            raise PlanError("3 heads cannot be shared by 2 servers", got="3")
        return planned(0.3 / asked.stages)

    found = search_grids(Plan(microbatches=1), 2, plan)
    reasons = {str(grid): grid.reason for grid in found.grids}
    assert reasons["1 × 1 × 2"] == "3 heads cannot be shared by 2 servers (3)"
    # The plan itself refuses it.
    assert reasons["1 × 2 × 1"].startswith("There are fewer micro-batches than replicas")
    assert str(found.chosen) == "2 × 1 × 1"


def test_nothing_that_can_be_planned_is_an_error() -> None:
    def plan(asked: Plan) -> RunPlan:
        raise PlanError("too few nodes")

    with pytest.raises(PlanError, match="No grid") as caught:
        search_grids(Plan(), 2, plan)
    assert "too few nodes" in (caught.value.got or "")


def test_the_table_shows_the_chosen_grid_first() -> None:
    def plan(asked: Plan) -> RunPlan:
        if asked.replicas > 1:
            raise PlanError("no")
        return planned(1.0 / asked.stages)

    found = search_grids(Plan(), 2, plan)
    console = Console(width=120, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(grid_view(found, console.width))
    rows = [line.split() for line in captured.get().splitlines() if line.strip()]
    assert rows[1][:3] == ["stages", "replicas", "tensor"]
    assert rows[3][:5] == ["→", "2", "1", "1", "2"]
    assert rows[-1][-1] == "no"
