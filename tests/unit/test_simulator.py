"""Seconds of a step, from programs and costs."""

from __future__ import annotations

import pytest

from gradwire_coordinator.placement import looped, v_shaped
from gradwire_coordinator.schedules import gpipe, interleaved_1f1b, one_f_one_b
from gradwire_coordinator.simulator import (
    LinkSeconds,
    StageBytes,
    StageSeconds,
    StepCosts,
    equal_stages_bubble,
    simulate,
    step_seconds,
)
from gradwire_coordinator.zero_bubble import zb_h1
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import Action, parse_program

ONE_TWO = StageSeconds(forward=1.0, backward=2.0)
NO_LINK = LinkSeconds(0.0, 0.0, 0.0)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 5), (2, 8), (4, 4), (8, 16)])
def test_equal_stages_without_links_take_the_ideal_time(schedule: str, stages: int, micro_batches: int) -> None:
    programs = {"gpipe": gpipe, "1f1b": one_f_one_b}[schedule](stages, micro_batches)
    seconds = step_seconds(programs, [ONE_TWO] * stages, [NO_LINK] * (stages - 1))
    assert seconds == pytest.approx(3 * (micro_batches + stages - 1))


def test_a_link_adds_what_nothing_hides_and_one_that_is_slower_than_the_stages_sets_the_pace() -> None:
    programs = one_f_one_b(2, 100, 1)
    hidden = step_seconds(programs, [ONE_TWO] * 2, [LinkSeconds(0.5, 0.5, 0.1)])
    # The first forward and the last backward.
    assert hidden == pytest.approx(3 * 101 + 2 * 0.6, abs=0.01)
    slow = step_seconds(programs, [ONE_TWO] * 2, [LinkSeconds(10.0, 1.0, 0.0)])
    assert slow == pytest.approx(100 * 10 + 1 + 3 + 1 + 2)
    # The other way is another direction of the link.
    assert step_seconds(programs, [ONE_TWO] * 2, [LinkSeconds(10.0, 10.0, 0.0)]) == pytest.approx(1000 + 16, abs=1)


def test_a_deeper_warm_up_hides_the_delay_of_a_link() -> None:
    link = LinkSeconds(0.0, 0.0, 0.5)
    textbook, deeper = (step_seconds(one_f_one_b(2, 50, extra), [ONE_TWO] * 2, [link]) for extra in (0, 1))
    assert deeper == pytest.approx(3 * 51 + 1.0)
    assert textbook > deeper + 10


def test_a_backward_in_two_parts_sends_the_first_and_hides_the_second() -> None:
    whole = [parse_program("0F0 0F1 0B0 0B1"), parse_program("1F0 1B0 1F1 1B1")]
    parts = [parse_program("0F0 0F1 0I0 0W0 0I1 0W1"), parse_program("1F0 1I0 1F1 1I1 1W0 1W1")]
    link = [LinkSeconds(0.0, 0.0, 0.0)]
    assert step_seconds(whole, [ONE_TWO] * 2, link) == pytest.approx(1 + 3 + 3 + 2)
    assert step_seconds(parts, [ONE_TWO] * 2, link) == pytest.approx(1 + 2 + 2 + 2)


def test_stages_of_one_server_take_turns_and_need_no_link() -> None:
    slow = LinkSeconds(100.0, 100.0, 100.0)
    together = [parse_program("0F0 1F0 1B0 0B0")]
    assert step_seconds(together, [ONE_TWO] * 2, [slow]) == pytest.approx(6)
    around = [parse_program("0F0 2F0 2B0 0B0"), parse_program("1F0 1B0")]
    assert step_seconds(around, [ONE_TWO] * 3, [NO_LINK, NO_LINK]) == pytest.approx(9)


def test_programs_that_deadlock_are_refused() -> None:
    programs = one_f_one_b(2, 2)
    programs[1].reverse()
    with pytest.raises(PlanError, match="deadlock"):
        step_seconds([programs[0], programs[1][:1] + programs[0]], [ONE_TWO] * 2, [NO_LINK])


def costs(placement: tuple[int, ...], stage: StageSeconds, held: StageBytes, link: LinkSeconds = NO_LINK) -> StepCosts:
    count = len(placement)
    return StepCosts(placement, (stage,) * count, (link,) * (count - 1), (held,) * count)


def test_when_each_action_runs_and_who_has_nothing_to_do() -> None:
    parts = StageSeconds(forward=1.0, backward=3.0, input_gradient=2.0, weight_gradient=1.5)
    programs = [parse_program("0F0 0B0"), parse_program("1F0 1I0 1W0")]
    found = simulate(programs, costs((0, 1), parts, StageBytes(0, 0), LinkSeconds(0.25, 0.5, 0.25)))
    assert found.timed == (
        ((0, Action(0, "F", 0), 0.0, 1.0), (0, Action(0, "B", 0), 5.25, 8.25)),
        ((1, Action(1, "F", 0), 1.5, 2.5), (1, Action(1, "I", 0), 2.5, 4.5), (1, Action(1, "W", 0), 4.5, 6.0)),
    )
    assert found.seconds == 8.25
    assert found.busy == (4.0, 4.5)
    assert found.bubble_ratio == pytest.approx(1 - 8.5 / 16.5)


def test_what_is_held_at_the_peak() -> None:
    programs = [parse_program("0F0 0F1 0I0 0F2 0I1 0W0 0B2 0W1")]
    found = simulate(programs, costs((0,), ONE_TWO, StageBytes(activations=100, for_weights=30)))
    assert found.peak_live == (2,)
    assert found.peak_bytes == (100 + 100 + 30,)
    # As published: all micro-batches, and p − s.
    held = StageBytes(1, 0)
    assert simulate(gpipe(4, 9), costs(looped(4), ONE_TWO, held)).peak_bytes == (9, 9, 9, 9)
    assert simulate(one_f_one_b(4, 9), costs(looped(4), ONE_TWO, held)).peak_bytes == (4, 3, 2, 1)


def test_messages_between_the_same_servers_share_a_link() -> None:
    """From server 0 to 1 go the forwards of stage 0 and the gradients of stage 3, one after the other."""
    link = LinkSeconds(10.0, 10.0, 0.0)
    programs = [parse_program("0F0 3F0 3B0 0F1 3F1 3B1 0B0 0B1"), parse_program("1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1")]
    found = simulate(programs, costs(v_shaped(2), ONE_TWO, StageBytes(0, 0), link))
    arrivals = {str(item.action): item.start for item in found.timed[1]}
    # 0F0 ends at 1; there 11, back 23; 3B0 ends at 26, its gradient is sent until 36, and then the second forward.
    assert arrivals["1F0"] == 11
    assert arrivals["1F1"] == 46


def test_parts_that_nobody_measured_are_halves() -> None:
    assert StageSeconds(1.0, 3.0).of == {"F": 1.0, "B": 3.0, "I": 1.5, "W": 1.5}
    assert StageSeconds.in_parts(1.0, 2.0, 3.0).of == {"F": 1.0, "B": 5.0, "I": 2.0, "W": 3.0}


def test_what_comes_at_the_end_of_a_step() -> None:
    """Ties are added, and norms taken, when all who take part are there; updates wait for nobody."""
    of = StepCosts(
        (0, 1, 2), (ONE_TWO,) * 3, (NO_LINK,) * 2, (StageBytes(0, 0),) * 3, (0.5, 0.0, 0.5), (1.0, 0.25, 2.0)
    )
    parts = ["0F0 0B0 REDUCE UPDATE", "1F0 1B0 UPDATE", "2F0 2B0 REDUCE UPDATE"]
    found = simulate([parse_program(text) for text in parts], of)
    ends = [{item.action.kind: item.end for item in timed} for timed in found.timed]
    assert ends == [
        {"F": 1.0, "B": 9.0, "REDUCE": 9.5, "UPDATE": 10.5},
        {"F": 2.0, "B": 7.0, "UPDATE": 7.25},
        {"F": 3.0, "B": 5.0, "REDUCE": 9.5, "UPDATE": 11.5},
    ]
    assert found.seconds == 11.5
    assert found.busy == (4.5, 3.25, 5.5)
    with_norm = simulate([parse_program(text.replace("UPDATE", "NORM UPDATE")) for text in parts], of)
    assert [timed[-1].end for timed in with_norm.timed] == [10.5, 9.75, 11.5]
    assert of.whole_step([[], [], []]) == [parse_program(text) for text in ("REDUCE UPDATE", "UPDATE", "REDUCE UPDATE")]
    assert of.seconds_at_the_end(2) == 2.5


def test_costs_fit_the_stages() -> None:
    with pytest.raises(PlanError, match="do not fit"):
        StepCosts((0, 1), (ONE_TWO,) * 2, (), (StageBytes(0, 0),) * 2)
    with pytest.raises(PlanError, match="do not fit the servers"):
        StepCosts((0, 1), (ONE_TWO,) * 2, (NO_LINK,), (StageBytes(0, 0),) * 2, update=(1.0,))
    assert simulate([[]], costs((0,), ONE_TWO, StageBytes(0, 0))).bubble_ratio == 0


def test_the_bubble_of_equal_stages_is_that_of_the_papers() -> None:
    assert equal_stages_bubble(one_f_one_b(4, 8), looped(4)) == pytest.approx(3 / 11)
    assert equal_stages_bubble(gpipe(4, 8), looped(4)) == pytest.approx(3 / 11)
    assert equal_stages_bubble(interleaved_1f1b(4, 8, 2), looped(4, 2)) == pytest.approx(3 / (2 * 8 + 3))
    # A third of that of 1F1B, in time.
    assert equal_stages_bubble(zb_h1(4, 8), looped(4)) == pytest.approx(3 / (3 * 8 + 3))
    assert equal_stages_bubble(one_f_one_b(1, 8), looped(1)) == pytest.approx(0.0)


def test_replicas_exchange_before_tied_copies_and_without_waiting_for_other_stages() -> None:
    of = StepCosts(
        (0, 1, 2),
        (ONE_TWO,) * 3,
        (NO_LINK,) * 2,
        (StageBytes(0, 0),) * 3,
        reduce=(0.5, 0.0, 0.5),
        update=(1.0, 1.0, 1.0),
        exchange=(2.0, 3.0, 7.0),
    )
    programs = [parse_program(text) for text in ("0F0 0B0", "1F0 1B0", "2F0 2B0")]
    found = simulate(of.whole_step(programs), of)
    spans = [{item.action.kind: (item.start, item.end) for item in timed} for timed in found.timed]
    # Backwards end at 9, 7 and 5; the tied copies of servers 0 and 2 are added when both have exchanged, at 12.
    assert [span["REDUCE"] for span in spans] == [(10.0, 12.5), (7.0, 10.0), (5.0, 12.5)]
    assert [span["UPDATE"][1] for span in spans] == [13.5, 11.0, 13.5]
    assert [of.reduce_seconds(server) for server in range(3)] == [2.5, 3.0, 7.5]
    assert [of.seconds_at_the_end(server) for server in range(3)] == [3.5, 4.0, 8.5]
    assert found.busy == (6.5, 7.0, 11.5)
