"""The schedules of the literature by name."""

from __future__ import annotations

import pytest

from gradwire_coordinator.named_schedules import SCHEDULES, named_programs, named_schedule
from gradwire_coordinator.placement import looped, v_shaped
from gradwire_coordinator.timetable import check_programs
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import INPUT_GRADIENT


def test_names() -> None:
    assert list(SCHEDULES) == ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"]
    with pytest.raises(PlanError, match=r"Unknown schedule.*gpipe or 1f1b"):
        named_schedule("zigzag")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("servers", [1, 2, 5])
def test_programs_go_with_their_placement(name: str, servers: int) -> None:
    schedule = named_schedule(name)
    virtual_stages = schedule.virtual_stages[0]
    placement = schedule.placement(servers, virtual_stages)
    assert len(placement) == servers * virtual_stages
    programs = schedule.programs(servers, 6, virtual_stages)
    check_programs(programs, 6, backward=True, placement=placement)
    found = any(action.kind == INPUT_GRADIENT for program in programs for action in program)
    assert not found or schedule.splits


def test_how_many_stages_a_server_may_have() -> None:
    named_schedule("interleaved-1f1b").check(4)
    with pytest.raises(PlanError, match=r"zb-v is not made for 3 virtual stages.*set virtual_stages to 2"):
        named_schedule("zb-v").check(3)
    with pytest.raises(PlanError, match="2 to 16"):
        named_schedule("interleaved-1f1b").check(1)


def test_which_go_with_a_placement() -> None:
    assert list(named_programs(looped(3), 8)) == ["gpipe", "1f1b", "zb-h1", "1f1b+1", "1f1b+2", "1f1b+3"]
    assert list(named_programs(looped(3, 2), 8)) == ["interleaved-1f1b"]
    assert list(named_programs(v_shaped(3), 8)) == ["zb-v"]
    assert list(named_programs((0, 0, 1), 8)) == []
    assert "1f1b+1" not in named_programs(looped(1), 8)
