"""Actions and programs print as text that parses back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.errors import FrameError
from gradwire_protocol.program import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NORM,
    OF_MICRO_BATCH,
    REDUCE,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
    format_program,
    parse_action,
    parse_program,
    program_from_proto,
    program_to_proto,
)
from gradwire_protocol.v1 import run_pb2

actions = st.one_of(
    st.builds(Action, st.integers(0, 999), st.sampled_from(sorted(OF_MICRO_BATCH)), st.integers(0, 999)),
    st.sampled_from([REDUCE, NORM, UPDATE]).map(lambda kind: Action(0, kind, 0)),
)


@given(st.lists(actions, max_size=30))
def test_programs_survive_text_and_wire(program):
    assert parse_program(format_program(program)) == program
    message = run_pb2.Program.FromString(program_to_proto(program).SerializeToString())
    assert program_from_proto(message) == program


def test_text_form():
    assert str(Action(2, FORWARD, 0)) == "2F0"
    assert format_program([Action(1, BACKWARD, 3), Action(0, UPDATE, 0)]) == "1B3 UPDATE"
    assert format_program([Action(2, INPUT_GRADIENT, 0), Action(2, WEIGHT_GRADIENT, 0)]) == "2I0 2W0"


@pytest.mark.parametrize("text", ["", "F0", "2X0", "2F", "2F-1", "update", "2F0 "])
def test_other_text_is_refused(text):
    with pytest.raises(FrameError, match="Not an action"):
        parse_action(text)


def test_unknown_kinds_from_the_wire_are_refused():
    with pytest.raises(FrameError, match="Unknown kind"):
        program_from_proto(run_pb2.Program(actions=[run_pb2.Action(kind=77)]))
