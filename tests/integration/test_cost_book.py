"""Costs of nodes, measured by real servers over loopback: when they are asked, what is remembered, what stops them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_cluster import Cluster, RemoteServer, StageServer, wait_until

from gradwire.graph import ExportedModel, export_model
from gradwire.job.gpt import GPT, VOCABULARY, Shape, next_byte_loss
from gradwire_coordinator.cost_book import CostBook
from gradwire_coordinator.costs import ESTIMATED, MEASURED, NodeCosts, Rates
from gradwire_coordinator.model_checks import IndexedModel, check_model
from gradwire_coordinator.registry import Server
from gradwire_coordinator.segments import make_segments
from gradwire_protocol.channels import open_channel
from gradwire_protocol.errors import FrameError, GradwireError, LimitExceeded, ModelError, ServerBusy
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2, stage_pb2
from gradwire_stage.segment import BuiltSegment

ROWS = 4


@pytest.fixture(scope="module")
def exported() -> ExportedModel:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (ROWS, 64))
    return export_model(GPT(Shape(layers=3, width=128, heads=2, context=64)), next_byte_loss, (tokens, tokens))


@pytest.fixture(scope="module")
def indexed(exported: ExportedModel) -> IndexedModel:
    return check_model(exported.proto)


@pytest.fixture
def stages() -> Iterator[list[StageServer]]:
    made = [StageServer(f"cost-{index}") for index in range(2)]
    yield made
    for server in made:
        server.stop()


def known(stage: RemoteServer, name: str = "a processor", *, flops: float = 1e9) -> Server:
    """What a registry knows of a server; by this estimate a micro-batch of the model takes long."""
    device = coordinator_pb2.DeviceInfo(
        kind="cpu", name=name, threads=1, flops_per_second=flops, bytes_per_second=1e9, memory_bytes=2**33
    )
    return Server(
        server=stage.name,
        role=coordinator_pb2.SERVER_ROLE_STAGE,
        address=stage.address,
        metrics_address="",
        device=device,
        version="test",
        heard_at=0.0,
        progressed_at=0.0,
        client_progressed_at=0.0,
    )


class Dialled:
    """Opens channels, and notes to where."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def __call__(self, address: str) -> Any:
        self.addresses.append(address)
        return open_channel(address)


def plan(rows: int = ROWS, **changes: Any) -> run_pb2.Plan:
    return run_pb2.Plan(**{"stages": 2, "micro_batches": 1, "expected_rows": rows, "virtual_stages": 1, **changes})


def same(first: NodeCosts, second: NodeCosts) -> bool:
    return first.source == second.source and np.array_equal(first.seconds(), second.seconds())


def test_servers_of_a_make_are_asked_once_and_together(
    indexed: IndexedModel, stages: list[StageServer], tmp_path: Path
) -> None:
    dial = Dialled()
    book = CostBook(dial, directory=tmp_path / "costs")
    servers = [known(stage) for stage in stages]
    first, second = book.of(indexed, plan(), servers)
    assert first is second
    assert first.source == MEASURED
    assert sorted(dial.addresses) == sorted(stage.address for stage in stages)
    assert all(0 < seconds < 0.05 for seconds in first.action)
    assert (first.forward > 0).all()
    # A layer's products have weights, and what is made of values alone has none.
    nodes = indexed.train.graph.nodes
    weighted = [node.name for node, seconds in zip(nodes, first.weight_gradient, strict=True) if seconds > 0]
    assert any(name.startswith("linear") for name in weighted)
    assert not any(name.startswith(("gelu", "add", "scaled")) for name in weighted)
    assert first.held_bytes.sum() > 0

    again = CostBook(dial, directory=tmp_path / "costs")
    for remembering in (book, again):
        assert same(remembering.of(indexed, plan(), servers[1:])[0], first)
        assert remembering.of(indexed, plan(rows=2 * ROWS), servers)[0].source == MEASURED
    assert len(dial.addresses) == 2
    # Far from what was measured, and of another type.
    book.of(indexed, plan(rows=16 * ROWS), servers)
    book.of(indexed, plan(precision=2), servers)
    assert len(dial.addresses) == 6


def test_each_make_is_measured_for_itself(indexed: IndexedModel, stages: list[StageServer]) -> None:
    dial = Dialled()
    book = CostBook(dial, seconds=1.0)
    servers = [known(stages[0], "one"), known(stages[1], "another")]
    costs = book.of(indexed, plan(), servers)
    assert [each.source for each in costs] == [MEASURED, MEASURED]
    assert sorted(dial.addresses) == sorted(stage.address for stage in stages)


@pytest.mark.parametrize("case", ["off", "one stage", "a small model"])
def test_servers_are_left_alone_where_it_does_not_matter(
    indexed: IndexedModel, stages: list[StageServer], case: str
) -> None:
    dial = Dialled()
    book = CostBook(dial, seconds=0.0 if case == "off" else 1.0)
    servers = [known(stage, flops=1e15 if case == "a small model" else 1e9) for stage in stages]
    if case == "a small model":
        for server in servers:
            server.device.bytes_per_second = 1e15
    (costs, *_) = book.of(indexed, plan(stages=1 if case == "one stage" else 2), servers)
    assert costs.source == ESTIMATED
    assert dial.addresses == []


def test_custom_operators_are_measured_however_small_the_model(
    exported: ExportedModel, stages: list[StageServer]
) -> None:
    """Of a server that has them: here none does, and says so."""
    model = graph_pb2.Model()
    model.CopyFrom(exported.proto)
    model.operators.add(target="mylibrary.scale.default", schema="mylibrary::scale(Tensor x) -> Tensor")
    next(node for node in model.train.nodes if node.target == "aten.gelu.default").target = "mylibrary.scale.default"
    dial = Dialled()
    server = known(stages[0], flops=1e15)
    server.device.bytes_per_second = 1e15
    assert CostBook(dial).of(check_model(model), plan(), [server])[0].source == ESTIMATED
    assert dial.addresses == [server.address]


def test_a_server_that_is_busy_or_gone_leaves_estimates(exported: ExportedModel, indexed: IndexedModel) -> None:
    book = CostBook(open_channel)
    with Cluster({"busy": [0, 1, 2]}) as cluster:
        server = cluster.servers["busy"]
        cluster.prepare()
        with pytest.raises(ServerBusy, match="held by another run"):
            server.call("MeasureCosts", request(exported))
        assert book.of(indexed, plan(), [known(server)])[0].source == ESTIMATED
        server.call("Release", stage_pb2.ReleaseRequest(run="r", generation=1))
        assert book.of(indexed, plan(), [known(server)])[0].source == MEASURED
    assert CostBook(open_channel).of(indexed, plan(), [known(server)])[0].source == ESTIMATED


def request(exported: ExportedModel, **changes: Any) -> stage_pb2.MeasureCostsRequest:
    graph = exported.proto.train
    fields = {"rows": [ROWS], "seconds": 2.0, **changes}
    ends = [*graph.allowed_cuts, len(graph.nodes)]
    return stage_pb2.MeasureCostsRequest(graph=graph, tensors=exported.proto.tensors, ends=ends, **fields)


def test_one_measurement_at_a_time_and_a_run_waits_for_it(exported: ExportedModel) -> None:
    with Cluster({"busy": [0, 1, 2]}) as cluster:
        server = cluster.servers["busy"]
        call = server.stub.MeasureCosts.future(request(exported, seconds=30.0, rows=[256, 255, 254, 253]))
        wait_until(lambda: server.stage_service.holder.is_preparing)
        with pytest.raises(ServerBusy, match="measures costs"):
            server.call("MeasureCosts", request(exported))
        call.cancel()
        # Soon: the measurement sees that nobody waits for it.
        cluster.prepare()
        assert server.activity().run == "r"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"seconds": 0.0}, FrameError),
        ({"rows": []}, LimitExceeded),
        ({"graph": graph_pb2.Graph(nodes=[graph_pb2.Node(name="a", target="aten.from_file.default")])}, ModelError),
    ],
)
def test_what_is_wrong_with_a_request_is_said_over_the_wire(
    exported: ExportedModel, stages: list[StageServer], change: dict[str, Any], kind: type[GradwireError]
) -> None:
    asked = request(exported)
    for field, value in change.items():
        if field == "graph":
            asked.graph.CopyFrom(value)
            asked.ends[:] = [1]
        elif field == "rows":
            asked.rows[:] = value
        else:
            setattr(asked, field, value)
    with pytest.raises(kind):
        stages[0].call("MeasureCosts", asked)
    # It is free again.
    assert stages[0].call("MeasureCosts", request(exported, seconds=0.01)).measured


def test_measured_costs_are_those_of_execution(
    exported: ExportedModel, indexed: IndexedModel, stages: list[StageServer]
) -> None:
    """The sum over nodes, and the whole graph run as a stage runs it. Loosely, for the machine may be busy.

    The execution is timed by its thread's own clock, which others' work does not slow down.
    """
    costs = CostBook(open_channel).of(indexed, plan(), [known(stages[0])])[0]
    (segments,) = make_segments(indexed, [], ROWS, Rates(1e9, 1e9)).stages
    segment = next(each for each in segments if each.graph == graph_pb2.GRAPH_KIND_TRAIN)
    store = {
        name: torch.nn.Parameter(tensor) if indexed.tensors[name].requires_grad else tensor
        for name, tensor in exported.tensors.items()
    }
    built = BuiltSegment(segment, store, torch.device("cpu"), seed=0)
    tokens = torch.randint(0, VOCABULARY, (ROWS, 64))
    batch = dict.fromkeys((item.value for item in segment.incoming), tokens)
    runs = []
    for number in range(12):
        times = [time.thread_time()]
        made = built.forward(batch, step=1, micro_batch=number, record=True)
        times.append(time.thread_time())
        made.backward_input({}, {}, 1.0)
        times.append(time.thread_time())
        made.backward_weight()
        times.append(time.thread_time())
        runs.append([end - start for start, end in itertools.pairwise(times)])
    executed = [min(part) for part in zip(*runs, strict=True)]
    measured = [float(part.sum()) for part in (costs.forward, costs.input_gradient, costs.weight_gradient)]
    for one, other in zip(measured, executed, strict=True):
        assert other / 3 < one < other * 3
