"""Which schedule a run gets: the one asked for or the fastest that fits, with all that was considered, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradwire_coordinator.candidates import Considered, Way, choose
from gradwire_coordinator.placement import Placement, looped, v_shaped
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts, simulate
from gradwire_protocol.errors import PlanError

STAGE = StageSeconds.in_parts(10e-3, 10e-3, 10e-3)


def way(placement: Placement, *, delay: float = 0.0, memory: int = 0) -> Way:
    """Servers that take 30 ms for a micro-batch, hold 100 bytes, and 60 for each micro-batch in flight."""
    count, servers = len(placement), 1 + max(placement)
    each = servers / count
    stage = StageSeconds.in_parts(10e-3 * each, 10e-3 * each, 10e-3 * each)
    link, held = LinkSeconds(0.0, 0.0, delay), StageBytes(round(60 * each), round(30 * each))
    costs = StepCosts(placement, (stage,) * count, (link,) * (count - 1), (held,) * count)
    return Way(tuple(range(1, count)), costs, (100,) * servers, (memory,) * servers, traffic_bytes=8 * (count - 1))


def names(considered: tuple[Considered, ...]) -> list[str]:
    return [item.candidate.name for item in considered]


def test_what_the_plan_asks_for_is_chosen_beside_what_it_could_have_been() -> None:
    choice = choose("1f1b", [way(looped(4))], 16)
    assert choice.chosen.candidate.name == "1f1b"
    assert names(choice.considered) == ["zb-h1", "1f1b", "gpipe"]
    # (m + p − 1) × 30 ms.
    assert choice.chosen.seconds == pytest.approx(19 * 30e-3)
    assert choice.reason == "the plan asks for 1f1b; zb-h1 would take 10.5% less, 510 ms"
    assert choice.lower_bound_seconds == pytest.approx(510e-3)
    assert all(item.candidate.fits for item in choice.considered)


def test_one_f_one_b_warms_up_as_deep_as_its_links_want() -> None:
    choice = choose("1f1b", [way(looped(4), delay=2e-3)], 16)
    assert choice.chosen.schedule == "1f1b"
    assert choice.chosen.extra_warm_up > 0
    assert names(choice.considered).count(choice.chosen.candidate.name) == 1
    # The textbook's is there to compare, and no other depth.
    assert len([item for item in choice.considered if item.schedule == "1f1b"]) == 2
    assert f"its warm-up is {choice.chosen.extra_warm_up} deeper" in choice.reason


def test_auto_is_the_fastest_and_its_numbers_are_those_of_the_simulator() -> None:
    choice = choose("auto", [way(looped(4))], 16)
    best = choice.chosen
    assert best is choice.considered[0]
    assert best.seconds == min(item.seconds for item in choice.considered)
    again = simulate(best.way.costs.whole_step(best.candidate.programs), best.way.costs)
    assert again == best.candidate.simulation
    assert best.seconds == pytest.approx(choice.lower_bound_seconds)
    assert choice.reason.startswith(("an order made for these costs takes 510 ms; the next best, ", "zb-h1 is"))


def test_auto_compares_placements_and_prefers_fewer_stages() -> None:
    ways = [way(looped(2)), way(looped(2, 2)), way(v_shaped(2))]
    choice = choose("auto", ways, 8)
    assert {item.schedule for item in choice.considered} >= {"gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zb-v"}
    assert choice.chosen.seconds == min(item.seconds for item in choice.considered)
    # On one server nothing can be gained.
    alone = [way(looped(1)), way(looped(1, 2))]
    assert choose("auto", alone, 8).chosen.way is alone[0]


def test_a_schedule_runs_where_its_placement_is() -> None:
    ways = [way(looped(2)), way(looped(2, 2)), way(v_shaped(2))]
    for name, place in (("gpipe", 0), ("zb-h1", 0), ("interleaved-1f1b", 1), ("zb-v", 2)):
        choice = choose(name, ways, 4)
        assert choice.chosen.way is ways[place], name
        assert choice.chosen.schedule == name
    with pytest.raises(PlanError, match="not placed as zb-v needs them"):
        choose("zb-v", ways[:2], 4)
    with pytest.raises(PlanError, match="Unknown schedule"):
        choose("zigzag", ways, 4)


def test_memory_leaves_schedules_out() -> None:
    # GPipe holds 8 micro-batches, 480 bytes beside the 100; 1F1B two, and 100 + 120 is enough for it.
    choice = choose("auto", [way(looped(2), memory=300)], 8)
    fits = {item.candidate.name: item.candidate.fits for item in choice.considered}
    assert not fits["gpipe"]
    assert fits["1f1b"]
    assert choice.chosen.candidate.fits
    assert "there is not enough memory for gpipe" in choice.reason
    assert max(choice.chosen.peak_bytes) <= 300
    with pytest.raises(PlanError, match="gpipe does not fit in the memory of server 0") as caught:
        choose("gpipe", [way(looped(2), memory=300)], 8)
    assert caught.value.got == "580 bytes at the peak: 280 too many"
    assert "take a schedule that fits (" in caught.value.remedy
    assert "1f1b" in caught.value.remedy
    with pytest.raises(PlanError, match="activations of one micro-batch do not fit"):
        choose("auto", [way(looped(2), memory=150)], 8)


def test_a_server_whose_memory_is_not_known_has_enough() -> None:
    known = way(looped(2), memory=300)
    half = replace(known, memory_bytes=(0, 300))
    assert half.limits == [float("inf"), 200.0]
    assert choose("1f1b", [half], 8).chosen.candidate.fits
