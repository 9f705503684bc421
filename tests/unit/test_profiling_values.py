"""Made-up values: of the right shapes and types, indices within what they point to, numbers of a usual size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiled import exported

from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2
from gradwire_stage.profiling_values import Maker, index_bounds, size_bytes

CPU = torch.device("cpu")


def value_spec(dtype: torch.dtype, *shape: tuple[int, int]) -> graph_pb2.ValueSpec:
    """Sizes are (fixed, per row)."""
    return graph_pb2.ValueSpec(
        kind=graph_pb2.VALUE_KIND_TENSOR,
        data_type=DATA_TYPES[dtype],
        shape=[graph_pb2.AffineSize(fixed=fixed, per_row=per_row) for fixed, per_row in shape],
    )


@pytest.mark.parametrize("dtype", DATA_TYPES)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), max_size=3), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_values_of_every_type_and_shape(dtype: torch.dtype, shape: list[tuple[int, int]], rows: int) -> None:
    spec = value_spec(dtype, *shape)
    made = Maker(CPU).value(spec, rows, bound=3)
    assert made.dtype == dtype
    assert list(made.shape) == [max(0, fixed + per_row * rows) for fixed, per_row in shape]
    assert made.nbytes == size_bytes(spec, rows)
    if not dtype.is_floating_point and not dtype.is_complex:
        assert ((made >= 0) & (made < 3)).all()


def test_large_tensors_repeat_what_was_drawn() -> None:
    made = Maker(CPU).value(value_spec(torch.float32, (3, 0), (70_001, 0)), 1)
    assert torch.equal(made.view(-1)[:1000], made.view(-1)[1 << 16 : (1 << 16) + 1000])
    assert made.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("layers", [3, 50])
def test_weights_keep_the_size_of_what_they_are_multiplied_with(layers: int) -> None:
    """So that no arithmetic on denormal numbers, which is slow, is measured in a deep model."""
    maker = Maker(CPU)
    spec = graph_pb2.TensorSpec(
        name="w", kind=graph_pb2.TENSOR_KIND_PARAMETER, requires_grad=True, data_type=DATA_TYPES[torch.float32]
    )
    spec.shape.extend((64, 64))
    x = maker.value(value_spec(torch.float32, (16, 0), (64, 0)), 1)
    for _ in range(layers):
        x = torch.nn.functional.linear(x, maker.tensor(spec))
    assert 1e-6 < x.std() < 1e6


def test_tensors_of_the_model_are_what_they_say() -> None:
    maker = Maker(CPU)
    for kind, dtype, shape, value in (
        (graph_pb2.TENSOR_KIND_PARAMETER, torch.float32, [3], 1.0),  # a norm's weight
        (graph_pb2.TENSOR_KIND_BUFFER, torch.float32, [], 1.0),  # a variance
        (graph_pb2.TENSOR_KIND_BUFFER, torch.int64, [2, 3], 0.0),  # a table of positions
        (graph_pb2.TENSOR_KIND_CONSTANT, torch.bool, [2, 2], 1.0),  # a mask
    ):
        spec = graph_pb2.TensorSpec(name="t", kind=kind, data_type=DATA_TYPES[dtype], shape=shape)
        made = maker.tensor(spec)
        assert isinstance(made, torch.nn.Parameter) == (kind == graph_pb2.TENSOR_KIND_PARAMETER)
        assert (made.dtype, list(made.shape)) == (dtype, shape)
        assert (made == value).all()


def test_indices_stay_within_the_tables_that_they_are_used_on() -> None:
    """Tokens are looked up in an embedding of 11 rows, and targets are flattened before they name one of 11 classes."""
    model = exported("gpt")
    tensors = {spec.name: spec for spec in model.tensors}
    bounds = index_bounds(model.train, tensors, rows=4)
    assert bounds == {"batch.input_0": 11, "batch.target": 11}
    drawn = Maker(CPU).value(model.train.inputs[0].spec, 64, bounds["batch.input_0"])
    assert set(drawn.unique().tolist()) == set(range(11))


def test_the_smallest_of_several_tables_counts() -> None:
    graph = graph_pb2.Graph()
    graph.inputs.add(value="i", spec=value_spec(torch.int64, (0, 1)))
    graph.inputs.add(value="x", spec=value_spec(torch.float32, (9, 0), (5, 0)))
    viewed = graph.nodes.add(name="v", target="aten.unsqueeze.default")
    viewed.arguments.add(value="i")
    taken = graph.nodes.add(name="g", target="aten.index.Tensor")
    taken.arguments.add(value="x")
    taken.arguments.add().list.items.extend((graph_pb2.Argument(value="i"), graph_pb2.Argument(value="v")))
    assert index_bounds(graph, {}, 2) == {"i": 5}
    selected = graph.nodes.add(name="s", target="aten.index_select.default")
    selected.arguments.extend(
        (graph_pb2.Argument(value="g"), graph_pb2.Argument(integer=0), graph_pb2.Argument(value="v"))
    )
    taken.output.CopyFrom(value_spec(torch.float32, (1, 1)))
    assert index_bounds(graph, {}, 2) == {"i": 3}
