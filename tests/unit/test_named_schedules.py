"""The schedules of the literature by name."""

from __future__ import annotations

import pytest

from gradwire_coordinator.named_schedules import (
    AUTO,
    SCHEDULES,
    check_schedule,
    named_programs,
    named_schedule,
    placements,
    schedule_of,
)
from gradwire_coordinator.placement import looped, v_shaped
from gradwire_coordinator.timetable import check_programs
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import INPUT_GRADIENT


def test_names() -> None:
    assert list(SCHEDULES) == ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"]
    with pytest.raises(PlanError, match=r"Unknown schedule.*auto or gpipe or 1f1b"):
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


def test_where_the_stages_of_a_schedule_can_go() -> None:
    assert placements("1f1b", 3, 1) == [looped(3)]
    assert placements("zb-v", 3, 2) == [v_shaped(3)]
    assert placements(AUTO, 3, 1) == [looped(3)]
    assert placements(AUTO, 3, 2) == [looped(3, 2), v_shaped(3)]
    assert placements(AUTO, 3, 3) == [looped(3, 3)]
    assert placements(AUTO, 1, 2) == [(0, 0)]
    for placement in (*placements(AUTO, 3, 1), *placements(AUTO, 3, 2), *placements(AUTO, 3, 3)):
        assert schedule_of(AUTO, placement).placement(3, len(placement) // 3) == placement
    assert schedule_of("zb-h1", looped(3)).name == "zb-h1"


def test_what_a_plan_may_ask_for() -> None:
    check_schedule(AUTO, 16)
    check_schedule("zb-v", 2)
    with pytest.raises(PlanError, match="1 to 16"):
        check_schedule(AUTO, 0)
    with pytest.raises(PlanError, match="virtual_stages"):
        check_schedule("1f1b", 0)
    with pytest.raises(PlanError, match="Unknown schedule"):
        check_schedule("zigzag", 1)
