"""Costs of nodes and values, from what a graph and a device say of themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graph_text import graph, model

from gradwire_coordinator.costs import (
    Rates,
    TravellingValue,
    device_rates,
    node_seconds,
    rows_per_micro_batch,
    travelling_values,
)
from gradwire_coordinator.graph_index import value_bytes
from gradwire_coordinator.model_checks import check_model
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
