"""Which part of the parameters each replica updates: together all of them, once, in equal shares or whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.errors import OptimizerError
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.exchange.buckets import make_buckets
from gradwire_stage.exchange.sharding import Sharding

SIZES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=2), min_size=1, max_size=8)


def shardings(
    shapes: list[list[int]], places: int, *, whole: bool, tied: set[str]
) -> tuple[dict[str, torch.Tensor], list[Sharding]]:
    parameters: dict[str, torch.Tensor] = {
        f"p{number}": torch.nn.Parameter(torch.zeros(shape)) for number, shape in enumerate(shapes)
    }
    uses = [graph_pb2.TensorUse(value=name, tensor=name) for name in parameters]
    segment = stage_pb2.Segment(graph=graph_pb2.GRAPH_KIND_TRAIN, tensors=uses)
    buckets = make_buckets([segment], parameters, tied=tied, maximum_bytes=100)
    return parameters, [Sharding(buckets, parameters, places=places, own=own, whole=whole) for own in range(places)]


@given(SIZES, st.integers(2, 5), st.booleans())
def test_every_element_is_updated_by_one_replica(shapes: list[list[int]], places: int, whole: bool) -> None:
    parameters, each = shardings(shapes, places, whole=whole, tied={"p0"})
    for place, sharding in enumerate(each):
        assert sharding.buckets == each[0].buckets
        assert sharding.parts == each[0].parts
        assert sharding.names == parameters.keys() - {"p0"}
        for name, kept in sharding.slices.items():
            assert not whole or kept.shape == parameters[name].shape
            with torch.no_grad():
                kept.add_(place + 1)  # the parameter's own memory
    for name, parameter in parameters.items():
        held = sum(sharding.slices[name].numel() for sharding in each if name in sharding.slices)
        assert held == (0 if name == "p0" else parameter.numel())
        assert bool((parameter == 0).any()) == (name == "p0" and parameter.numel() > 0)


@given(SIZES, st.integers(2, 5))
def test_shares_are_equal_but_for_an_element_a_bucket(shapes: list[list[int]], places: int) -> None:
    _, each = shardings(shapes, places, whole=False, tied=set())
    held = [sum(kept.numel() for kept in sharding.slices.values()) for sharding in each]
    assert max(held) - min(held) <= len(each[0].buckets)


def test_whole_parameters_go_to_the_one_who_has_the_least() -> None:
    _, each = shardings([[8, 9], [6, 9], [5, 9], [7, 9]], 2, whole=True, tied=set())
    held = [sum(kept.numel() for kept in sharding.slices.values()) for sharding in each]
    assert held == [117, 117]


def test_state_is_cut_as_its_parameter_is() -> None:
    parameters, each = shardings([[3, 3]], 2, whole=False, tied=set())
    value = torch.arange(9.0).view(3, 3)
    parts = [sharding.own_state("p0", parameters["p0"], value) for sharding in each]
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    assert [part.shape for part in tensors] == [kept.shape for sharding in each for kept in sharding.slices.values()]
    assert torch.equal(torch.cat(tensors), value.view(-1))
    assert each[0].own_state("p0", parameters["p0"], 7) == 7
    step = torch.tensor(7.0)
    assert each[0].own_state("p0", parameters["p0"], step) is step


def test_state_of_another_form_cannot_be_cut() -> None:
    parameters, each = shardings([[3, 3]], 2, whole=False, tied=set())
    with pytest.raises(OptimizerError, match="cannot be shared out"):
        each[0].own_state("p0", parameters["p0"], torch.zeros(3))
