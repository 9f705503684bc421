"""Programs of entries: those of a schedule for any number of micro-batches, what goes around them, who takes part."""

from __future__ import annotations

import pytest
from graph_text import plan

from gradwire_coordinator.bounds import Flow, untaken_bounds
from gradwire_coordinator.named_schedules import SCHEDULES
from gradwire_coordinator.placement import Placement, looped, neighbours, v_shaped
from gradwire_coordinator.programs import ChosenSchedule, ProgramBook, recomputing_stages
from gradwire_coordinator.schedules import Programs, gpipe, one_f_one_b
from gradwire_coordinator.sharing import Sharing
from gradwire_protocol.errors import FrameError, ModelError, PlanError
from gradwire_protocol.program import format_program, parse_program, program_from_proto
from gradwire_protocol.v1 import graph_pb2, run_pb2

TRAIN, EVALUATE = graph_pb2.GRAPH_KIND_TRAIN, graph_pb2.GRAPH_KIND_EVALUATE
# Of two stages on each of two servers; no named schedule has this order.
MADE = [
    parse_program("0F0 0F1 0F2 0F3 3F0 3B0 3F1 3B1 0B0 3F2 3B2 0B1 3F3 3B3 0B2 0B3"),
    parse_program("1F0 2F0 1F1 2F1 1F2 2F2 1F3 2F3 2B0 1B0 2B1 1B1 2B2 1B2 2B3 1B3"),
]


def book(schedule: str = "gpipe", extra_warm_up: int = 0) -> ProgramBook:
    return ProgramBook(
        ChosenSchedule(schedule, looped(3), extra_warm_up=extra_warm_up),
        tied_servers={0, 2},
        active_stages={TRAIN: {0, 1, 2}, EVALUATE: {0, 2}},
    )


def texts(programs: list[run_pb2.Program]) -> list[str]:
    return [format_program(program_from_proto(program)) for program in programs]


def parts(count: int) -> list[run_pb2.MicroBatch]:
    return [run_pb2.MicroBatch(index=index, rows=1, first_row=index) for index in range(count)]


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (gpipe(3, 4), [True, True, True]),
        (one_f_one_b(3, 4), [True, True, False]),
        (gpipe(3, 1), [False, False, False]),
        (one_f_one_b(3, 1), [False, False, False]),
    ],
)
def test_stages_whose_backwards_follow_directly_do_not_recompute(programs: Programs, expected: list[bool]) -> None:
    assert recomputing_stages(programs) == expected


def test_which_stages_recompute_where_a_server_has_several_and_backwards_are_in_two_parts() -> None:
    programs = [parse_program("0F0 0F1 3F0 3I0 3F1 3I1 3W0 0B0 3W1 0B1"), parse_program("1F0 2F0 1F1 2F1 2I0 2I1 2W0")]
    assert recomputing_stages(programs) == [True, True, True, False]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("servers", [1, 2, 3, 5])
def test_named_schedules_have_sound_programs_for_any_number_of_micro_batches(name: str, servers: int) -> None:
    named = SCHEDULES[name]
    schedule = ChosenSchedule(name, named.placement(servers, named.virtual_stages[0]))
    assert (schedule.servers, schedule.virtual_stages) == (servers, named.virtual_stages[0])
    for micro_batches in range(1, 12):  # each is checked when it is made
        assert len(schedule.programs(micro_batches)) == servers


def test_1f1b_warms_up_as_deep_as_chosen() -> None:
    schedule = ChosenSchedule("1f1b", looped(3), extra_warm_up=2)
    assert schedule.programs(8) == one_f_one_b(3, 8, 2)
    assert schedule.programs(2) == one_f_one_b(3, 2, 2)


def test_what_was_made_for_a_step_serves_smaller_ones_and_a_named_schedule_larger_ones() -> None:
    schedule = ChosenSchedule("auto", v_shaped(2), made=MADE)
    assert schedule.programs(4) == MADE
    assert format_program(schedule.programs(2)[0]) == "0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1"
    assert schedule.programs(5) == SCHEDULES["zb-v"].programs(2, 5, 2)
    assert ChosenSchedule("auto", looped(2, 2)).programs(5) == SCHEDULES["interleaved-1f1b"].programs(2, 5, 2)
    assert ChosenSchedule("auto", looped(2)).programs(5) == one_f_one_b(2, 5, 1)


def test_programs_that_are_not_sound_are_refused() -> None:
    with pytest.raises(PlanError, match="deadlock"):
        ChosenSchedule("auto", v_shaped(2), made=[MADE[0][4:5] + MADE[0][:4] + MADE[0][5:], MADE[1]]).programs(4)
    with pytest.raises(PlanError, match="Unknown schedule"):
        ChosenSchedule("zigzag", looped(2)).programs(1)


@pytest.mark.parametrize(
    ("schedule", "most"),
    [
        *((ChosenSchedule(name, looped(4)), 14) for name in ("gpipe", "1f1b", "zb-h1")),
        *((ChosenSchedule("1f1b", looped(4), extra_warm_up=extra), 14) for extra in (1, 3)),
        *((ChosenSchedule("zb-v", v_shaped(servers)), 18) for servers in (2, 3, 4)),
        *((ChosenSchedule("interleaved-1f1b", looped(2, v)), 18) for v in (2, 3, 5, 8)),
        *((ChosenSchedule("interleaved-1f1b", looped(3, v)), 26) for v in (2, 3, 5)),
        *((ChosenSchedule("interleaved-1f1b", looped(5, v)), 42) for v in (2, 3)),
        (ChosenSchedule("auto", v_shaped(2), made=MADE), 9),
    ],
    ids=str,
)
def test_no_step_leads_further_ahead_than_the_extremes(schedule: ChosenSchedule, most: int) -> None:
    """Servers refuse what is above the bounds, and those come from the extremes."""

    def furthest(programs: Programs) -> dict[Flow, int]:
        return {
            flow: bound
            for stage in range(len(schedule.placement) - 1)
            for flow, bound in untaken_bounds(programs, (stage, stage + 1)).items()
        }

    def joined(found: list[dict[Flow, int]]) -> dict[Flow, int]:
        return {flow: max(each[flow] for each in found) for flow in found[0]}

    every = [furthest(schedule.programs(count)) for count in range(1, most + 1)]
    for largest in range(1, most + 1):
        found = joined([furthest(programs) for programs in schedule.extremes(largest)])
        assert found == joined(every[:largest])


def test_where_values_travel() -> None:
    def ends(*placements: Placement) -> list[tuple[int, int]]:
        return neighbours(placements)

    assert ends(looped(1, 3)) == []
    assert ends(looped(3)) == [(0, 1), (1, 2)]
    assert ends(looped(3, 2)) == [(0, 1), (1, 2), (2, 0)]
    assert ends(looped(2, 2)) == [(0, 1)]
    assert ends(v_shaped(3), looped(3, 2)) == [(0, 1), (1, 2), (2, 0)]


def test_ties_are_reduced_by_their_holders_and_norms_by_all() -> None:
    entry = run_pb2.Entry(train_step=run_pb2.TrainStep(micro_batches=parts(1)))
    assert texts(book().of_entry(entry)) == ["0F0 0B0 REDUCE UPDATE", "1F0 1B0 UPDATE", "2F0 2B0 REDUCE UPDATE"]
    entry.train_step.max_gradient_norm = 1.0
    assert texts(book().of_entry(entry)) == [
        "0F0 0B0 REDUCE NORM UPDATE",
        "1F0 1B0 NORM UPDATE",
        "2F0 2B0 REDUCE NORM UPDATE",
    ]


def test_a_stage_without_a_segment_has_nothing_to_do() -> None:
    entry = run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=parts(2)))
    assert texts(book().of_entry(entry)) == ["0F0 0F1", "", "2F0 2F1"]


def test_evaluation_goes_through_all_stages_of_a_server() -> None:
    several = ProgramBook(
        ChosenSchedule("zb-v", v_shaped(2)), tied_servers=(), active_stages={EVALUATE: {0, 1, 3}, TRAIN: range(4)}
    )
    entry = run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=parts(3)))
    assert texts(several.of_entry(entry)) == ["0F0 0F1 0F2 3F0 3F1 3F2", "1F0 1F1 1F2"]
    train = run_pb2.Entry(train_step=run_pb2.TrainStep(micro_batches=parts(1)))
    assert texts(several.of_entry(train)) == ["0F0 3F0 3I0 3W0 0B0 UPDATE", "1F0 2F0 2I0 2W0 1I0 1W0 UPDATE"]
    assert texts(several.of_entry(run_pb2.Entry(load_state=run_pb2.LoadState()))) == ["", ""]


def test_entries_that_move_state_have_no_actions() -> None:
    assert texts(book().of_entry(run_pb2.Entry(load_state=run_pb2.LoadState()))) == ["", "", ""]
    assert texts(book().of_entry(run_pb2.Entry(fetch_state=run_pb2.FetchState()))) == ["", "", ""]


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(ModelError, match="no prediction graph"):
        book().of_entry(run_pb2.Entry(predict=run_pb2.Predict(micro_batches=parts(1))))
    with pytest.raises(FrameError, match="no kind"):
        book().of_entry(run_pb2.Entry(number=3))


def test_replicas_run_their_own_micro_batches_in_the_same_order() -> None:
    """Three servers, two replicas of them, five micro-batches of which the second replica has two."""
    replicated = ProgramBook(
        ChosenSchedule("gpipe", looped(3)),
        tied_servers={0, 2},
        active_stages={TRAIN: {0, 1, 2}, EVALUATE: {0, 2}},
        replicas=2,
    )
    dealt = parts(5)
    for part in dealt:
        part.replica = part.index % 2
    train = run_pb2.Entry(train_step=run_pb2.TrainStep(micro_batches=dealt))
    alone = texts(book().of_entry(run_pb2.Entry(train_step=run_pb2.TrainStep(micro_batches=parts(2)))))
    made = texts(replicated.of_entry(train))
    # As if it were alone, but for the names of its micro-batches, and for REDUCE everywhere.
    for text, of_one in zip(made[3:], alone, strict=True):
        renamed = of_one.replace("F1", "F3").replace("B1", "B3").replace("F0", "F1").replace("B0", "B1")
        assert text == (renamed if "REDUCE" in renamed else renamed.replace("UPDATE", "REDUCE UPDATE"))
    assert made[1] == "1F0 1F2 1F4 1B0 1B2 1B4 REDUCE UPDATE"
    small = run_pb2.TrainStep(micro_batches=parts(1), max_gradient_norm=1.0)
    assert texts(replicated.of_entry(run_pb2.Entry(train_step=small)))[3:] == ["REDUCE NORM UPDATE"] * 3
    evaluate = run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=dealt[:1]))
    assert texts(replicated.of_entry(evaluate)) == ["0F0", "", "2F0", "", "", ""]
    assert texts(replicated.of_entry(run_pb2.Entry(load_state=run_pb2.LoadState()))) == [""] * 6


def shared_book(replicas: int, **fields: object) -> ProgramBook:
    """Of two servers a replica, of which the first holds a tied copy."""
    return ProgramBook(
        ChosenSchedule("gpipe", looped(2)),
        tied_servers={0},
        active_stages={TRAIN: {0, 1}, EVALUATE: {0, 1}},
        replicas=replicas,
        sharing=Sharing.of(plan(2, replicas=replicas, **fields), "AdamW"),
    )


def step(number: int, micro_batches: int, norm: float | None = None) -> run_pb2.Entry:
    """The micro-batches are dealt to two replicas in turn."""
    dealt = parts(micro_batches)
    for part in dealt:
        part.replica = part.index % 2
    return run_pb2.Entry(train_step=run_pb2.TrainStep(step=number, micro_batches=dealt, max_gradient_norm=norm))


def test_replicas_that_share_the_optimizer_gather_weights_behind_each_update() -> None:
    made = shared_book(2)
    expected = ["0F0 0B0", "1F0 1B0", "0F1 0B1", "1F1 1B1"]
    for number in (1, 2):
        assert texts(made.of_entry(step(number, 2))) == [f"{own} REDUCE UPDATE GATHER" for own in expected]
    # A replica without a micro-batch has its part of the weights all the same.
    assert texts(made.of_entry(step(3, 1, norm=1.0)))[2:] == ["REDUCE NORM UPDATE GATHER"] * 2
    assert texts(made.of_entry(run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=parts(1))))) == [
        *("0F0", "1F0", "", "")
    ]


@pytest.mark.parametrize("fields", [{"zero": "off"}, {"compression": "int8"}])
def test_without_sharing_nothing_is_gathered(fields: dict[str, object]) -> None:
    made = texts(shared_book(2, **fields).of_entry(step(1, 2)))
    assert all(text.endswith("REDUCE UPDATE") for text in made)


def test_local_steps_average_every_so_many_and_reduce_tied_copies_only() -> None:
    made = shared_book(2, exchange="local(every=3)")
    alone = ["0F0 0B0 REDUCE UPDATE", "1F0 1B0 UPDATE", "0F1 0B1 REDUCE UPDATE", "1F1 1B1 UPDATE"]
    for number in range(1, 10):
        behind = " AVERAGE" if number % 3 == 0 else ""
        assert texts(made.of_entry(step(number, 2))) == [own + behind for own in alone]
    # The norm is a replica's own; who has no micro-batch updates by nothing, and takes part in the average.
    assert texts(made.of_entry(step(6, 1, norm=1.0))) == [
        "0F0 0B0 REDUCE NORM UPDATE AVERAGE",
        "1F0 1B0 NORM UPDATE AVERAGE",
        "REDUCE NORM UPDATE AVERAGE",
        "NORM UPDATE AVERAGE",
    ]


def test_one_replica_shares_with_nobody() -> None:
    for fields in ({"zero": "on"}, {"exchange": "local(every=1)"}):
        made = shared_book(1, **fields).of_entry(
            run_pb2.Entry(train_step=run_pb2.TrainStep(step=1, micro_batches=parts(1)))
        )
        assert texts(made) == ["0F0 0B0 REDUCE UPDATE", "1F0 1B0 UPDATE"]


def test_stages_push_and_pull_where_parameter_servers_update() -> None:
    made = shared_book(2, exchange="parameter-server(servers=2)")
    stages = ["0F0 0B0 REDUCE GATHER", "1F0 1B0 REDUCE GATHER", "0F1 0B1 REDUCE GATHER", "1F1 1B1 REDUCE GATHER"]
    assert texts(made.of_entry(step(1, 2))) == [*stages, *["REDUCE UPDATE GATHER"] * 2]
    assert texts(made.of_entry(step(2, 2, norm=1.0))) == [*stages, *["REDUCE NORM UPDATE GATHER"] * 2]
    evaluate = run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=parts(1)))
    assert texts(made.of_entry(evaluate)) == ["0F0", "1F0", "", "", "", ""]
    assert len(made.of_entry(run_pb2.Entry(fetch_state=run_pb2.FetchState()))) == 6


def test_the_shards_of_a_position_run_the_same_one_after_the_other() -> None:
    def made(shards: int) -> ProgramBook:
        return ProgramBook(
            ChosenSchedule("gpipe", looped(2)),
            tied_servers={1},
            active_stages={TRAIN: {0, 1}, EVALUATE: {0, 1}},
            replicas=2,
            shards=shards,
            sharing=Sharing.of(plan(2, replicas=2), "Adam"),
        )

    micro_batches = [run_pb2.MicroBatch(index=index, rows=1, first_row=index, replica=index % 2) for index in range(4)]
    for entry in (
        run_pb2.Entry(train_step=run_pb2.TrainStep(step=1, micro_batches=micro_batches)),
        run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=micro_batches)),
        run_pb2.Entry(load_state=run_pb2.LoadState()),
    ):
        alone = made(1).of_entry(entry)
        assert len(alone) == 4
        assert made(3).of_entry(entry) == [program for program in alone for _ in range(3)]
