"""Segments with group operators: built for several shards only, run by all of them, and measured by one alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shard_threads import Table, ThreadShards, run_shards

from gradwire_protocol.errors import FrameError, InternalError, LimitExceeded, ModelError
from gradwire_protocol.group_operators import COPY, CROSS_ENTROPY, EMBEDDING, SUM
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.device import CpuDevice
from gradwire_stage.group.parts import own_part
from gradwire_stage.group.tensor_group import short_name
from gradwire_stage.profiling import measure_costs
from gradwire_stage.profiling_checks import check_measure
from gradwire_stage.segment import BuiltSegment

CPU = torch.device("cpu")
WORDS, WIDTH, ROWS = 8, 6, 5


def node(name: str, target: str, *values: str, shape: tuple[int, ...] = ()) -> graph_pb2.Node:
    made = graph_pb2.Node(name=name, target=target, arguments=[graph_pb2.Argument(value=value) for value in values])
    made.output.CopyFrom(spec_of(torch.float64, *shape))
    return made


def spec_of(dtype: torch.dtype, *sizes: int) -> graph_pb2.ValueSpec:
    """Sizes: 0 stands for the rows."""
    return graph_pb2.ValueSpec(
        kind=graph_pb2.VALUE_KIND_TENSOR,
        data_type=DATA_TYPES[dtype],
        shape=[graph_pb2.AffineSize(fixed=size, per_row=int(not size)) for size in sizes],
    )


def nodes(size: int) -> list[graph_pb2.Node]:
    """A table of words that shards have rows of, and that gives the scores, too."""
    return [
        node("rows", EMBEDDING, "x", shape=(0, WIDTH)),
        node("e", SUM, "rows", shape=(0, WIDTH)),
        node("h", "aten.tanh.default", "e", shape=(0, WIDTH)),
        node("c", COPY, "h", shape=(0, WIDTH)),
        node("scores", "aten.linear.default", "c", "p", shape=(0, WORDS // size)),
        node("loss", CROSS_ENTROPY, "scores", "y"),
    ]


def segment(size: int = 2) -> stage_pb2.Segment:
    made = stage_pb2.Segment(
        graph=graph_pb2.GRAPH_KIND_TRAIN,
        nodes=nodes(size),
        tensors=[graph_pb2.TensorUse(value="p", tensor="table")],
        incoming=[stage_pb2.IncomingValue(value=name, from_batch=True) for name in "xy"],
        loss="loss",
    )
    made.nodes[0].arguments.insert(0, graph_pb2.Argument(value="p"))
    return made


def table() -> torch.Tensor:
    return torch.randn(WORDS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(WORDS, (ROWS,), generator=generator) for name in "xy"}


def reference() -> tuple[torch.Tensor, torch.Tensor]:
    whole, given = table().requires_grad_(), batch()
    loss = F.cross_entropy(torch.tanh(F.embedding(given["x"], whole)) @ whole.T, given["y"])
    loss.backward()
    assert whole.grad is not None
    return loss.detach(), whole.grad


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_shards_run_it_as_one_process_runs_the_whole(size: int, keep: bool, split: bool) -> None:
    second = Table(size)  # of what is run again

    def work(group: ThreadShards) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.nn.Parameter(own_part(table(), 0, [WORDS], shards=size, shard=group.own).clone())
        built = BuiltSegment(segment(size), {"table": own}, CPU, 0, shards=size)
        made = built.forward(batch(), step=0, micro_batch=0, record=True, keep=keep, group=group)
        if not keep:
            assert made.inputs is not None
            made = built.again(made.inputs, ThreadShards(group.own, size, second))
        assert made.loss is not None
        loss = made.loss.detach()
        if split:
            made.backward_input({}, {}, 1.0)
            made.backward_weight()
        else:
            made.backward({}, {}, 1.0)
        assert own.grad is not None
        return loss, own.grad

    found, exchanged = run_shards(size, work)
    loss, gradient = reference()
    for made, _ in found:
        assert torch.equal(made, found[0][0])
        torch.testing.assert_close(made, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([part for _, part in found]), gradient, rtol=1e-12, atol=1e-12)
    forward, backward = {"e", "loss/largest", "loss/sums"}, {"c/gradient"}
    assert exchanged.names == (forward | backward if keep else forward)
    assert second.names == (set() if keep else forward | backward)


def test_one_server_has_no_group_operators() -> None:
    with pytest.raises(ModelError, match=r"gradwire\.group_embedding' is for tensor-parallel servers"):
        BuiltSegment(segment(), {"table": table()}, CPU, 0)


def test_a_segment_of_several_is_not_run_without_the_others() -> None:
    built = BuiltSegment(segment(), {"table": table()}, CPU, 0, shards=2)
    with pytest.raises(InternalError, match="without the others"):
        built.forward(batch(), step=0, micro_batch=0, record=True)


def test_what_goes_wrong_between_servers_stays_what_it_is() -> None:
    class Failing(ThreadShards):
        def all_reduce(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
            raise FrameError("What a shard sent does not fit")

    def work(group: ThreadShards) -> None:
        built = BuiltSegment(segment(), {"table": table()[:4]}, CPU, 0, shards=2)
        failing = Failing(group.own, group.size, group.table)
        built.forward(batch(), step=0, micro_batch=0, record=True, group=failing)

    with pytest.raises(FrameError, match="does not fit"):
        run_shards(2, work)


def request(size: int) -> stage_pb2.MeasureCostsRequest:
    parts = segment(size)
    graph = graph_pb2.Graph(
        kind=graph_pb2.GRAPH_KIND_TRAIN,
        inputs=[graph_pb2.GraphInput(value=name, spec=spec_of(torch.int64, 0), batched=True) for name in "xy"],
        tensors=parts.tensors,
        nodes=parts.nodes,
        outputs=[graph_pb2.GraphOutput(value="loss")],
        allowed_cuts=range(1, len(parts.nodes)),
    )
    tensor = graph_pb2.TensorSpec(
        name="table",
        kind=graph_pb2.TENSOR_KIND_PARAMETER,
        requires_grad=True,
        data_type=DATA_TYPES[torch.float64],
        shape=(WORDS // size, WIDTH),
    )
    return stage_pb2.MeasureCostsRequest(
        graph=graph, tensors=[tensor], ends=range(1, len(parts.nodes) + 1), rows=[4], seconds=2.0, tensor=size
    )


def test_one_server_alone_measures_what_its_part_costs() -> None:
    reply = measure_costs(request(2), device=CpuDevice(1), memory_bytes=2**30, operators={}, cancelled=lambda: False)
    (measured,) = reply.measured
    assert len(measured.groups) == 6
    assert [cost.failure for cost in measured.groups] == [""] * 6


def test_group_operators_are_measured_only_for_several_servers() -> None:
    wrong = request(2)
    wrong.tensor = 0
    with pytest.raises(ModelError, match="not allowed"):
        check_measure(wrong, {})
    wrong.tensor = 2**20
    with pytest.raises(LimitExceeded, match="shards"):
        check_measure(wrong, {})


def test_long_names_are_told_apart_in_the_bounds_of_a_key() -> None:
    assert short_name("layers.0/ä") == "layers.0/ä"
    first, second = short_name("ä" * 300 + "1"), short_name("ä" * 300 + "2")
    assert first != second
    assert max(len(first.encode()), len(second.encode())) < 400
