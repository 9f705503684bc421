"""Costs of the nodes of real graphs, measured: every kind of model, and what stops a measurement."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from graph_models import cases
from profiled import exported, measure, request_of

from gradwire.graph import export_model
from gradwire_protocol.errors import Aborted
from gradwire_protocol.v1 import graph_pb2, tensors_pb2
from gradwire_stage.profiling_values import Maker


@pytest.mark.parametrize("kind", cases())
def test_every_group_of_every_kind_of_model_is_measured(kind: str) -> None:
    """Data-dependent shapes, in-place operators, views, numbers, buffers that change, regions, recurrences.

    What they hold adds up to what the whole graph does, although groups that are alike are run once.
    """
    model = exported(kind)
    request = request_of(model, rows=[4, 2])
    reply = measure(request)
    whole = measure(request_of(model, [len(model.train.nodes)], rows=[4, 2]))
    assert [costs.rows for costs in reply.measured] == [4, 2]
    for costs, single in zip(reply.measured, whole.measured, strict=True):
        assert len(costs.groups) == len(request.ends)
        assert {group.failure for group in costs.groups} == {""}
        assert sum(group.forward_seconds for group in costs.groups) > 0
        assert sum(group.input_gradient_seconds for group in costs.groups) > 0
        assert sum(group.held_bytes for group in costs.groups) == single.groups[0].held_bytes


def test_autocast_is_measured_as_it_will_run() -> None:
    """Activations of half the size, but for the parameters' casts, which are kept, too."""
    torch.manual_seed(0)
    case = cases()["gpt"]
    model = export_model(case.model.float(), case.loss, case.batch(4)).proto
    held = [
        measure(request_of(model, rows=[64], precision=precision)).measured[0].groups
        for precision in (tensors_pb2.DATA_TYPE_UNSPECIFIED, tensors_pb2.DATA_TYPE_BFLOAT16)
    ]
    assert sum(group.held_bytes for group in held[1]) < 0.8 * sum(group.held_bytes for group in held[0])


def test_only_groups_that_train_have_gradients() -> None:
    model = exported("gpt")
    for spec in model.tensors:
        spec.requires_grad = False
    groups = measure(request_of(model)).measured[0].groups
    assert sum(group.held_bytes for group in groups) == 0
    forward = sum(group.forward_seconds for group in groups)
    assert sum(group.input_gradient_seconds + group.weight_gradient_seconds for group in groups) < forward


def test_time_is_limited_and_what_remains_is_not_measured() -> None:
    model = exported("encoder")
    started = time.monotonic()
    groups = measure(request_of(model, seconds=1e-4)).measured[0].groups
    assert time.monotonic() - started < 5
    assert "the time for measuring was over" in {group.failure for group in groups}


def test_what_does_not_fit_is_not_run_and_the_rest_is_measured_on_stand_ins() -> None:
    model = exported("gpt")
    next(spec for spec in model.tensors if spec.name == "positions.weight").shape[0] = 10**9
    groups = measure(request_of(model)).measured[0].groups
    refused = [group.failure for group in groups if group.failure]
    assert refused
    assert all("bytes to run" in failure for failure in refused)
    assert len(refused) < len(groups) / 4


def test_a_group_that_fails_says_why() -> None:
    model = exported("gpt")
    add = next(node for node in model.train.nodes if node.target == "aten.add.Tensor")
    add.arguments[1].CopyFrom(graph_pb2.Argument(text="no tensor"))
    groups = measure(request_of(model)).measured[0].groups
    assert "aten.add.Tensor failed" in next(group.failure for group in groups if group.failure)
    assert sum(bool(group.failure) for group in groups) == 1


def test_it_ends_when_nobody_waits_any_more() -> None:
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > 2

    with pytest.raises(Aborted):
        measure(request_of(exported("gpt")), cancelled=cancelled)
    assert len(asked) == 3


def test_a_groups_tensors_are_gone_when_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not when Python looks for cycles: a model may be larger than the memory of one device."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    make = Maker.tensor

    def counted(maker: Maker, spec: graph_pb2.TensorSpec) -> torch.Tensor:
        nonlocal most
        made = make(maker, spec)
        alive.append(weakref.ref(made))
        most = max(most, sum(reference() is not None for reference in alive))
        return made

    monkeypatch.setattr(Maker, "tensor", counted)
    model = exported("gpt")
    gc.disable()
    try:
        measure(request_of(model, seconds=2.0))
    finally:
        gc.enable()
    assert len(alive) > 6
    assert most <= 2  # weight and bias of one node
