"""Programs of entries: what goes around the micro-batches, and which stages take part."""

from __future__ import annotations

import pytest

from gradwire_coordinator.programs import ProgramBook, choose_schedule, recomputing_stages, training_programs
from gradwire_protocol.errors import FrameError, ModelError, PlanError
from gradwire_protocol.program import format_program, parse_program, program_from_proto
from gradwire_protocol.v1 import graph_pb2, run_pb2

TRAIN, EVALUATE = graph_pb2.GRAPH_KIND_TRAIN, graph_pb2.GRAPH_KIND_EVALUATE


def book(schedule: str = "gpipe") -> ProgramBook:
    name, extra_warm_up = choose_schedule(schedule)
    return ProgramBook(
        schedule=name,
        extra_warm_up=extra_warm_up,
        stages=3,
        tied_stages={0, 2},
        active_stages={TRAIN: {0, 1, 2}, EVALUATE: {0, 2}},
    )


def texts(programs: list[run_pb2.Program]) -> list[str]:
    return [format_program(program_from_proto(program)) for program in programs]


def parts(count: int) -> list[run_pb2.MicroBatch]:
    return [run_pb2.MicroBatch(index=index, rows=1, first_row=index) for index in range(count)]


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "expected"),
    [
        ("gpipe", 4, [True, True, True]),
        ("1f1b", 4, [True, True, False]),
        ("gpipe", 1, [False, False, False]),
        ("1f1b", 1, [False, False, False]),
    ],
)
def test_stages_whose_backwards_follow_directly_do_not_recompute(
    schedule: str, micro_batches: int, expected: list[bool]
) -> None:
    assert recomputing_stages(training_programs(schedule, 0, 3, micro_batches)) == expected


def test_which_stages_recompute_where_a_server_has_several_and_backwards_are_in_two_parts() -> None:
    programs = [parse_program("0F0 0F1 3F0 3I0 3F1 3I1 3W0 0B0 3W1 0B1"), parse_program("1F0 2F0 1F1 2F1 2I0 2I1 2W0")]
    assert recomputing_stages(programs) == [True, True, True, False]


def test_ties_are_reduced_by_their_holders_and_norms_by_all() -> None:
    entry = run_pb2.Entry(train_step=run_pb2.TrainStep(micro_batches=parts(1)))
    assert texts(book().of_entry(entry)) == ["0F0 0B0 REDUCE UPDATE", "1F0 1B0 UPDATE", "2F0 2B0 REDUCE UPDATE"]
    entry.train_step.max_gradient_norm = 1.0
    assert texts(book().of_entry(entry)) == [
        "0F0 0B0 REDUCE NORM UPDATE",
        "1F0 1B0 NORM UPDATE",
        "2F0 2B0 REDUCE NORM UPDATE",
    ]


def test_auto_is_1f1b_with_one_more_to_warm_up() -> None:
    entry = run_pb2.Entry(train_step=run_pb2.TrainStep(micro_batches=parts(5)))
    assert texts(book("auto").of_entry(entry))[0].startswith("0F0 0F1 0F2 0F3 0B0 0F4 0B1")
    assert texts(book("1f1b").of_entry(entry))[0].startswith("0F0 0F1 0F2 0B0 0F3 0B1")


def test_fewer_micro_batches_than_stages() -> None:
    entry = run_pb2.Entry(train_step=run_pb2.TrainStep(micro_batches=parts(1)))
    assert texts(book("auto").of_entry(entry))[1] == "1F0 1B0 UPDATE"


def test_a_stage_without_a_segment_has_nothing_to_do() -> None:
    entry = run_pb2.Entry(evaluate=run_pb2.Evaluate(micro_batches=parts(2)))
    assert texts(book().of_entry(entry)) == ["0F0 0F1", "", "2F0 2F1"]


def test_entries_that_move_state_have_no_actions() -> None:
    assert texts(book().of_entry(run_pb2.Entry(load_state=run_pb2.LoadState()))) == ["", "", ""]
    assert texts(book().of_entry(run_pb2.Entry(fetch_state=run_pb2.FetchState()))) == ["", "", ""]


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(ModelError, match="no prediction graph"):
        book().of_entry(run_pb2.Entry(predict=run_pb2.Predict(micro_batches=parts(1))))
    with pytest.raises(FrameError, match="no kind"):
        book().of_entry(run_pb2.Entry(number=3))
    with pytest.raises(PlanError, match="Unknown schedule"):
        choose_schedule("zigzag")
