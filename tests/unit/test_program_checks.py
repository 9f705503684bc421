"""Programs that miss, repeat or disorder something are refused."""

from __future__ import annotations

import pytest

from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import parse_program
from gradwire_stage.exchange.agreement import StepEnd
from gradwire_stage.program_checks import check_program


@pytest.mark.parametrize(
    "program",
    [
        "0F0 0F1 0B0 0B1 UPDATE",
        "0F0 0B0 0F1 0B1 REDUCE UPDATE",
        "0F0 0F1 0I0 0I1 0W1 0W0 NORM UPDATE",
        "0F0 0I0 0W0 0F1 0B1 REDUCE NORM UPDATE",
    ],
)
def test_programs_of_steps(program: str) -> None:
    check_program(parse_program(program), [0], [0, 1], end=StepEnd())


@pytest.mark.parametrize(
    "program",
    [
        "",
        "UPDATE",
        "0F0 0F1 0B0 0B1",
        "0F0 0F1 0B0 UPDATE",
        "0F0 0F1 UPDATE",
        "0F0 0F1 0B0 0B1 0B1 UPDATE",
        "0F0 0F1 0F1 0B0 0B1 UPDATE",
        "0F0 0F1 0F2 0B0 0B1 0B2 UPDATE",
        "0F0 0F1 1F1 0B0 0B1 1B1 UPDATE",
        "0F0 0B1 0F1 0B0 UPDATE",
        "0F0 0F1 0I0 0I1 0W0 UPDATE",
        "0F0 0F1 0W0 0I0 0I1 0W1 UPDATE",
        "0I0 0F0 0F1 0W0 0I1 0W1 UPDATE",
        "0F0 0F1 0I0 0I0 0I1 0W0 0W1 UPDATE",
        "0F0 0F1 0I0 0I1 0W0 0W0 0W1 UPDATE",
        "0F0 0F1 0I0 0B0 0W0 0B1 UPDATE",
        "0F0 0F1 0I0 0I1 0W0 UPDATE 0W1",
        "0F0 0F1 0I0 0I1 0W0 REDUCE 0W1 UPDATE",
        "0F0 0F1 0I0 0I1 0W0 NORM 0W1 UPDATE",
        "0F0 0F1 0B0 UPDATE 0B1",
        "0F0 0F1 0B0 0B1 NORM REDUCE UPDATE",
        "0F0 0F1 0B0 0B1 UPDATE UPDATE",
    ],
)
def test_wrong_programs_of_steps(program: str) -> None:
    with pytest.raises(PlanError, match="does not do what its entry needs") as caught:
        check_program(parse_program(program), [0], [0, 1], end=StepEnd())
    assert "each of 2 micro-batches F, then B, or I and later W" in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "end"),
    [
        ({"reduces": True}, "REDUCE UPDATE"),
        ({"reduces": True}, "REDUCE NORM UPDATE"),
        ({"reduces": True, "gathers": True}, "REDUCE UPDATE GATHER"),
        ({"reduces": True, "gathers": True}, "REDUCE NORM UPDATE GATHER"),
        ({"averages": True}, "UPDATE"),
        ({"averages": True}, "NORM UPDATE AVERAGE"),
        # Those whose weights a parameter server has push and pull.
        ({"reduces": True, "gathers": True, "updates": False}, "REDUCE GATHER"),
        # Of tied copies within a replica that trains alone.
        ({"averages": True}, "REDUCE UPDATE AVERAGE"),
    ],
)
def test_how_steps_of_several_replicas_end(rules: dict[str, bool], end: str) -> None:
    check_program(parse_program(f"0F0 0B0 {end}"), [0], [0], end=StepEnd(**rules))
    # Also for a replica without a micro-batch.
    check_program(parse_program(end), [0], [], end=StepEnd(**rules))


@pytest.mark.parametrize(
    ("rules", "end", "expected"),
    [
        ({"reduces": True}, "UPDATE", "behind all of them REDUCE, NORM if need be, UPDATE"),
        ({"reduces": True}, "NORM UPDATE", "REDUCE, NORM if need be, UPDATE"),
        ({"reduces": True}, "UPDATE REDUCE", "REDUCE, NORM if need be, UPDATE"),
        ({"reduces": True, "gathers": True}, "REDUCE UPDATE", "UPDATE, GATHER"),
        ({"reduces": True, "gathers": True}, "REDUCE GATHER UPDATE", "UPDATE, GATHER"),
        ({"reduces": True, "gathers": True}, "REDUCE UPDATE GATHER GATHER", "UPDATE, GATHER"),
        ({"reduces": True, "gathers": True}, "REDUCE UPDATE AVERAGE", "UPDATE, GATHER"),
        ({"averages": True}, "UPDATE GATHER", "REDUCE if need be, NORM if need be, UPDATE, AVERAGE if need be"),
        ({"averages": True}, "AVERAGE UPDATE", "AVERAGE if need be"),
        ({"averages": True}, "AVERAGE", "AVERAGE if need be"),
        (
            {"reduces": True, "gathers": True, "updates": False},
            "REDUCE UPDATE GATHER",
            "behind all of them REDUCE, GATHER",
        ),
        ({"reduces": True, "gathers": True, "updates": False}, "GATHER", "REDUCE, GATHER"),
        ({}, "UPDATE AVERAGE", "UPDATE"),
        ({}, "UPDATE GATHER", "UPDATE"),
    ],
)
def test_steps_of_several_replicas_that_end_wrongly(rules: dict[str, bool], end: str, expected: str) -> None:
    with pytest.raises(PlanError, match="does not do what its entry needs") as caught:
        check_program(parse_program(f"0F0 0B0 {end}"), [0], [0], end=StepEnd(**rules))
    assert caught.value.expected.endswith(expected)


def test_what_ends_a_step_is_not_for_passes_that_only_go_forward() -> None:
    for end in ("REDUCE", "GATHER", "AVERAGE"):
        with pytest.raises(PlanError, match="F only"):
            check_program(parse_program(f"0F0 {end}"), [0], [0], end=None)


def test_programs_that_only_go_forward() -> None:
    check_program(parse_program("0F0 2F0 0F1 2F1"), [0, 2], [0, 1], end=None)
    check_program([], [], [0, 1], end=None)  # no segment here
    for wrong in ("0F0 2F0 0F1", "0F0 2F0 0F1 2F1 0B0", "0F0 2F0 0F1 2F1 UPDATE", "0F0 2F0 0F1 2F1 0I0 0W0"):
        with pytest.raises(PlanError, match="F only"):
            check_program(parse_program(wrong), [0, 2], [0, 1], end=None)
