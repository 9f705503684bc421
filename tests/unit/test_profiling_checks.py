"""Requests to measure costs that are none, and what their errors say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from profiled import exported, request_of

from gradwire_protocol.errors import FrameError, GradwireError, LimitExceeded, ModelError
from gradwire_protocol.v1 import stage_pb2, tensors_pb2
from gradwire_stage.profiling_checks import MAXIMUM_GROUPS, check_measure

Request = stage_pb2.MeasureCostsRequest


def good() -> Request:
    return request_of(exported("gpt"))


def test_a_good_request_passes() -> None:
    check_measure(good(), {})


def _set(field: str, value: object) -> Callable[[Request], None]:
    return lambda request: setattr(request, field, value)


def _rows(*rows: int) -> Callable[[Request], None]:
    def change(request: Request) -> None:
        request.rows[:] = rows

    return change


def _ends(*ends: int) -> Callable[[Request], None]:
    def change(request: Request) -> None:
        request.ends[:] = ends

    return change


def _target(target: str) -> Callable[[Request], None]:
    return lambda request: setattr(request.graph.nodes[3], "target", target)


CHANGES: list[tuple[str, Callable[[Request], object], type[GradwireError], str]] = [
    ("no nodes", lambda request: request.graph.ClearField("nodes"), LimitExceeded, "nodes"),
    ("no groups", _ends(), LimitExceeded, "groups"),
    ("too many groups", _ends(*range(MAXIMUM_GROUPS + 1)), LimitExceeded, str(MAXIMUM_GROUPS)),
    ("no rows", _rows(), LimitExceeded, "numbers of rows"),
    ("too many numbers of rows", _rows(1, 2, 3, 4, 5), LimitExceeded, "1 to 4"),
    ("zero rows", _rows(4, 0), FrameError, "rows"),
    ("absurd rows", _rows(2**40), FrameError, "rows"),
    ("no time", _set("seconds", 0.0), FrameError, "60 s"),
    ("too much time", _set("seconds", 61.0), FrameError, "60 s"),
    ("not a time", _set("seconds", float("nan")), FrameError, "60 s"),
    ("a precision that is not run", _set("precision", tensors_pb2.DATA_TYPE_FLOAT16), FrameError, "precision"),
    ("ends before the end", _ends(20), FrameError, "ascending ends"),
    ("ends that fall", lambda request: request.ends.insert(0, request.ends[1]), FrameError, "ascending ends"),
    ("a forbidden cut", lambda request: request.graph.ClearField("allowed_cuts"), FrameError, "allowed cuts"),
    ("a tensor twice", lambda request: request.tensors.append(request.tensors[0]), FrameError, "twice"),
    ("a nameless tensor", lambda request: request.tensors[0].ClearField("name"), FrameError, "name"),
    ("a tensor of no type", lambda request: request.tensors[0].ClearField("data_type"), FrameError, "type"),
    ("a negative size", lambda request: request.tensors[0].shape.append(-1), FrameError, "shape"),
    ("an absurd size", lambda request: request.tensors[0].shape.append(2**50), FrameError, "shape"),
    ("a nameless node", lambda request: request.graph.nodes[0].ClearField("name"), FrameError, "name"),
    ("a value of no type", lambda request: request.graph.nodes[-3].output.ClearField("data_type"), FrameError, "type"),
    ("an absurd value", lambda request: request.graph.inputs[0].spec.shape.add(fixed=2**50), FrameError, "shape"),
    ("a forbidden operator", _target("aten.from_file.default"), ModelError, "not allowed"),
]


@pytest.mark.parametrize(("change", "kind", "part"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_what_is_wrong_is_named(change: Callable[[Request], object], kind: type[GradwireError], part: str) -> None:
    request = good()
    change(request)
    with pytest.raises(kind) as caught:
        check_measure(request, {})
    assert part in str(caught.value)


def test_custom_operators_are_those_of_the_server() -> None:
    request = good()
    request.graph.nodes[3].target = "mylibrary.scale.default"
    with pytest.raises(ModelError, match="mylibrary"):
        check_measure(request, {})
    check_measure(request, {"mylibrary.scale.default": print})
