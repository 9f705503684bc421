"""Costs of nodes and values, from what a graph and a device say of themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graph_text import graph, model, tensor

from gradwire_coordinator.costs import (
    ESTIMATED,
    MEASURED,
    DeviceMake,
    Rates,
    TravellingValue,
    device_rates,
    node_costs,
    node_seconds,
    rows_per_micro_batch,
    trained_tensors,
    travelling_values,
)
from gradwire_coordinator.graph_index import value_bytes
from gradwire_coordinator.measured_costs import ActionSeconds, MeasuredGroups
from gradwire_coordinator.model_checks import IndexedModel, check_model
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, tensors_pb2

RATES = Rates(flops_per_second=1e6, bytes_per_second=1e6)


def test_seconds_are_affine_in_the_rows_and_take_the_longer_of_arithmetic_and_memory() -> None:
    nodes = graph("train", "input x\na = f(x)\nb = f(a)\noutput b", flops=10**6).nodes
    nodes[0].flops.fixed = 2 * 10**6
    nodes[1].bytes.per_row = 5 * 10**6
    seconds = node_seconds(nodes, 4, [RATES, Rates(flops_per_second=2e6, bytes_per_second=1e9)])
    # Forward and backward: three times the forward.
    assert seconds == pytest.approx(np.array([[3 * 6, 3 * 20], [3 * 3, 3 * 2]]), rel=1e-3)


def test_only_what_has_a_gradient_runs_backward() -> None:
    nodes = graph("train", "input x\na = f(x)\nb = f(a)\nc = f(b)\noutput c", flops=10**6).nodes
    nodes[1].no_grad = True
    nodes[2].output.data_type = tensors_pb2.DATA_TYPE_INT64
    assert node_seconds(nodes, 1, [RATES])[0] == pytest.approx([3, 1, 1], rel=1e-3)


def test_a_device_that_recomputes_runs_every_forward_twice() -> None:
    nodes = graph("train", "input x\na = f(x)\nb = f(a)\noutput b", flops=10**6).nodes
    nodes[1].no_grad = True
    assert node_seconds(nodes, 1, [RATES, RATES], [True, False]) == pytest.approx(np.array([[4, 2], [3, 1]]), rel=1e-3)


def test_values_that_travel() -> None:
    train = graph("train", "input x\na = f(x)\nb = f(a, x)\nc = f(a)\nd = f(c)\nloss = f(a)\noutput b\noutput loss")
    train.nodes[2].output.kind = graph_pb2.VALUE_KIND_INTEGER
    size = 2 * 4 * 4  # rows, elements, bytes
    assert travelling_values(check_model(model([], train)).train, rows=2) == [
        TravellingValue(0, (1, 2, 4), size, size),
        TravellingValue(1, (4,), size, size),  # an output is read at the end
        TravellingValue(2, (3,), 8, 0),
    ]


def test_bytes_of_values() -> None:
    spec = graph_pb2.ValueSpec(
        kind=graph_pb2.VALUE_KIND_TENSOR,
        data_type=tensors_pb2.DATA_TYPE_BFLOAT16,
        shape=[graph_pb2.AffineSize(fixed=1, per_row=2), graph_pb2.AffineSize(fixed=3)],
    )
    assert value_bytes(spec, rows=5) == 11 * 3 * 2


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_rates_that_were_not_measured_are_replaced(bad: float) -> None:
    devices = [
        coordinator_pb2.DeviceInfo(kind="cuda", flops_per_second=bad, bytes_per_second=3e11),
        coordinator_pb2.DeviceInfo(kind="abacus"),
    ]
    assert device_rates(devices) == [Rates(1e13, 3e11), Rates(2e10, 5e9)]


def test_devices_of_one_make_are_equally_fast() -> None:
    """One of two that started while the other kept the machine busy: its own measurement says nothing."""
    devices = [
        coordinator_pb2.DeviceInfo(kind="cpu", name="a", threads=threads, flops_per_second=flops, bytes_per_second=1e9)
        for threads, flops in ((1, 2e10), (1, 5e10), (2, 8e10))
    ]
    assert [rates.flops_per_second for rates in device_rates(devices)] == [5e10, 5e10, 8e10]


@pytest.mark.parametrize(("rows", "micro_batches", "largest"), [(8, 4, 2), (9, 4, 3), (3, 8, 1), (1, 1, 1)])
def test_rows_of_a_micro_batch(rows: int, micro_batches: int, largest: int) -> None:
    assert rows_per_micro_batch(rows, micro_batches) == largest


def layers() -> IndexedModel:
    """A frozen layer, its activation, a layer that trains, and a loss."""
    train = graph(
        "train",
        "input x\ntensor f = F\ntensor w = W\na = linear(x, f)\nb = tanh(a)\nc = linear(b, w)\nd = mean(c)\noutput d",
        flops=10**9,
    )
    for node in train.nodes:
        node.bytes.per_row = 100
    train.nodes[1].flops.per_row = 0
    frozen = tensor("F")
    frozen.requires_grad = False
    return check_model(model([frozen, tensor("W")], train))


DEVICES = [
    coordinator_pb2.DeviceInfo(kind="cpu", name=name, threads=1, flops_per_second=1e9, bytes_per_second=1e9)
    for name in ("a", "b", "a")
]


def test_estimates_are_split_in_forward_and_both_gradients() -> None:
    indexed = layers()
    trained = trained_tensors(indexed.tensors)
    assert trained == {"W"}
    first, second, third = node_costs(indexed.train, trained, 2, DEVICES)
    assert first is third
    assert first.source == ESTIMATED
    assert first.forward == pytest.approx([2, 1e-5, 2, 2], rel=1e-3, abs=1e-6)
    # Weights' gradients where weights that train are read; I and W apart take longer than B.
    assert first.weight_gradient == pytest.approx([0, 0, 2 * 1.03, 0], rel=1e-3)
    assert first.input_gradient[[0, 2]] == pytest.approx([4 * 1.03, 2 * 1.03], rel=1e-3)
    assert first.backward.sum() == pytest.approx(2 * first.forward.sum())
    for recomputes in (True, False):
        whole = node_seconds(indexed.train.graph.nodes, 2, device_rates(DEVICES[:1]), [recomputes])
        assert first.seconds(recompute=recomputes) == pytest.approx(whole[0])
    assert first.held_bytes.tolist() == [32, 32, 32, 32]
    assert second.seconds().tolist() == first.seconds().tolist()


def test_measured_costs_are_those_of_their_make() -> None:
    indexed = layers()
    groups = MeasuredGroups(
        ends=(2, 4),
        rows=(1, 2),
        fixed=np.array([[1.0, 2.0], [0.0, 1.0], [0.0, 4.0], [10.0, 0.0]]),
        per_row=np.array([[0.5, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 7.0]]),
        is_measured=np.array([True, True]),
        action=ActionSeconds(1.0, 2.0, 3.0, 4.0, 5.0),
    )
    measured = {DeviceMake("cpu", "a", 1): groups}
    first, second, third = node_costs(indexed.train, trained_tensors(indexed.tensors), 2, DEVICES, measured)
    assert (first.source, second.source) == (MEASURED, ESTIMATED)
    assert third is first
    # In a group as the estimate has it, and in sum as measured.
    assert first.forward == pytest.approx([2, 0, 2, 2], abs=1e-4)
    assert first.input_gradient == pytest.approx([0, 0, 1, 2], abs=1e-4)
    assert first.weight_gradient == pytest.approx([0, 0, 4, 0])
    assert first.held_bytes.tolist() == [5, 5, 7, 7]
    assert first.rows == 2
    assert first.action == groups.action
    assert min(second.action) > 0  # of an estimate, too


def test_of_custom_operators_the_shapes_tell_nothing() -> None:
    """So that they are long enough to be measured apart from what surrounds them."""
    nodes = graph("train", "input x\na = f(x)\nb = f(a)\noutput b", flops=0).nodes
    nodes[1].target = "mylibrary.scale.default"
    assert node_seconds(nodes, 1, [RATES])[0] == pytest.approx([3 * 10e-6, 3 * 100e-6])
