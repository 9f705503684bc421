"""Groups of nodes as segments: what goes in and out of each, and which are alike."""

from __future__ import annotations

import itertools

import pytest
from graph_text import graph, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_protocol.errors import ModelError
from gradwire_protocol.v1 import graph_pb2
from gradwire_stage.profiling_groups import Group, Grouping, read_values

LAYERS = 4
TENSORS = {name: tensor(name) for name in ("B", *(f"W{layer}" for layer in range(LAYERS)))}
# A layer is linear, tanh, and the sum with what came in; each but the first reads the layer before it.
TEXT = "\n".join(
    ["input x", *(f"tensor w{layer} = W{layer}" for layer in range(LAYERS)), "tensor b = B"]
    + [
        line
        for layer in range(LAYERS)
        for before in [f"s{layer - 1}" if layer else "x"]
        for line in (
            f"l{layer} = linear({before}, w{layer})",
            f"t{layer} = tanh(l{layer})",
            f"s{layer} = add(t{layer}, {before})",
        )
    ]
    + [f"loss = mean(s{LAYERS - 1}, b)", "output loss"]
)
NODES = 3 * LAYERS + 1


def groups(ends: list[int], made: graph_pb2.Graph | None = None) -> list[Group]:
    return Grouping(made or graph("train", TEXT), TENSORS).groups(ends)


def test_layers_that_do_the_same_are_alike() -> None:
    """The first is not: nobody wants the gradient of what it reads."""
    first, second, third, fourth, last = groups([3, 6, 9, 12, NODES])
    assert second.key == third.key == fourth.key
    assert second.segment == third.segment
    assert len({first.key, second.key, last.key}) == 3


@pytest.mark.parametrize("change", ["shape", "data_type", "requires_grad", "literal", "target", "no_grad", "output"])
def test_what_costs_something_else_is_not_alike(change: str) -> None:
    made = graph("train", TEXT)
    specs = {name: graph_pb2.TensorSpec.FromString(spec.SerializeToString()) for name, spec in TENSORS.items()}
    node = made.nodes[6]
    if change == "shape":
        specs["W2"].shape[0] = 17
    elif change == "data_type":
        specs["W2"].data_type = 1
    elif change == "requires_grad":
        specs["W2"].requires_grad = False
    elif change == "literal":
        node.arguments.add(integer=1)
    elif change == "target":
        node.target = "aten.matmul"
    elif change == "no_grad":
        node.no_grad = True
    else:
        node.output.shape[1].fixed = 5
    _, second, third, *_ = Grouping(made, specs).groups([3, 6, 9, 12, NODES])
    assert second.key != third.key


def test_where_in_the_users_code_a_node_stands_makes_no_difference() -> None:
    made = graph("train", TEXT)
    before = groups([3, 6, 9, 12, NODES], made)
    for node in made.nodes:
        node.source = f"model.py:{len(node.name)}: x"
        node.module_path = f"elsewhere.{node.name}"
    assert [group.key for group in groups([3, 6, 9, 12, NODES], made)] == [group.key for group in before]


@given(st.sets(st.integers(1, NODES - 1)))
@settings(deadline=None)
def test_values_go_from_group_to_group(cuts: set[int]) -> None:
    made = graph("train", TEXT)
    ends = [*sorted(cuts), NODES]
    found = groups(ends, made)
    assert sum(len(group.segment.nodes) for group in found) == NODES
    available = {"x"}
    for group, (first, end) in zip(found, itertools.pairwise([0, *ends]), strict=True):
        own = made.nodes[first:end]
        names = {node.name for node in own}
        read = {value for node in own for value in read_values(node)} - names - {use.value for use in made.tensors}
        assert set(group.incoming) == read
        assert read <= available
        later = {value for node in made.nodes[end:] for value in read_values(node)} | {"loss"}
        assert set(group.outgoing) == names & later
        available |= set(group.outgoing)
        for place, value in zip(group.segment.incoming, group.incoming, strict=True):
            assert place.HasField("gradient_from_stage") == (value in later)
        assert [node.target for node in group.segment.nodes] == [node.target for node in own]


def test_buffers_go_with_the_group_that_writes_them() -> None:
    made = graph("train", TEXT + "\nupdate t1 -> B\nmutate B")
    _, second, *_, last = groups([3, 6, 9, 12, NODES], made)
    assert [update.tensor for update in second.segment.buffer_updates] == ["t1"]
    assert list(second.segment.mutated_tensors) == ["t1"]
    assert [spec.name for spec in second.tensors] == ["t0", "t1"]
    assert list(last.segment.mutated_tensors) == ["t0"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("input x\na = f(y)\noutput a", "reads a value"),
        ("input x\na = f(x)\na = f(x)\noutput a", "twice"),
        ("input x\ntensor w = Z\na = f(x, w)\noutput a", "not described"),
        ("input x\na = f(x)\nupdate a -> Z\noutput a", "not described"),
    ],
)
def test_what_is_no_graph_is_refused(text: str, part: str) -> None:
    with pytest.raises(ModelError) as caught:
        Grouping(graph("train", text), TENSORS)
    assert part in str(caught.value)


def test_arguments_that_are_nested_too_deep_are_refused() -> None:
    node = graph_pb2.Node(name="a")
    argument = node.arguments.add()
    for _ in range(9):
        argument = argument.list.items.add()
    argument.value = "x"
    with pytest.raises(ModelError, match="nested"):
        list(read_values(node))
