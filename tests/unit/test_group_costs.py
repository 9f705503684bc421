"""What tensor groups exchange, and what that costs."""

from __future__ import annotations

import pytest
from sharded_samples import LINK, WIDTH, blocks_request, known, sharded

from gradwire_coordinator.boundaries import ASSUMED_LINK, Boundaries
from gradwire_coordinator.costs import Rates, trained_tensors
from gradwire_coordinator.graph_index import GraphIndex, index_graph
from gradwire_coordinator.group_costs import (
    Exchange,
    GroupLink,
    exchanges,
    group_bytes,
    group_links,
    slowest_group,
    with_exchanges,
    with_gathers,
)
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.segments import make_segments
from gradwire_coordinator.simulator import StageSeconds
from gradwire_protocol.errors import Unreachable
from gradwire_protocol.group_operators import BACKWARD_EXCHANGES, COPY, CROSS_ENTROPY, FORWARD_EXCHANGES, GATHER, SPLIT
from gradwire_protocol.v1 import graph_pb2, tensors_pb2

ROWS = 4
WHOLE = 4 * ROWS * WIDTH


def test_a_pair_of_products_adds_up_once_each_way() -> None:
    of = sharded(blocks_request(1))
    found = exchanges(of.indexed.train, trained_tensors(of.indexed.tensors), ROWS, 2)
    nodes = [of.indexed.train.graph.nodes[each.node].target for each in found]
    assert [each.backward for each in found] == [True, False] * 2
    assert {each.size_bytes for each in found} == {WHOLE}
    assert not any(each.gathers for each in found)
    assert sum(FORWARD_EXCHANGES.get(node.target, 0) for node in of.indexed.train.graph.nodes) == 2
    assert [target in BACKWARD_EXCHANGES for target in nodes] == [True, False] * 2


def test_what_no_trained_parameter_has_a_part_in_has_no_gradient_to_exchange() -> None:
    of = sharded(blocks_request(1))
    # The first scale comes before everything else.
    found = exchanges(of.indexed.train, trained_tensors(of.indexed.tensors) - {"scale0"}, ROWS, 2)
    assert [each.backward for each in found] == [False, True, False]


def operators() -> GraphIndex:
    """x (rows, 8) → its part → all of it again → scores of which each has 8 classes of 16 → loss."""
    spec = graph_pb2.ValueSpec(
        kind=graph_pb2.VALUE_KIND_TENSOR,
        data_type=tensors_pb2.DATA_TYPE_FLOAT32,
        shape=[graph_pb2.AffineSize(per_row=1), graph_pb2.AffineSize(fixed=8)],
    )
    half = graph_pb2.ValueSpec()
    half.CopyFrom(spec)
    half.shape[1].fixed = 4
    made = graph_pb2.Graph(kind=graph_pb2.GRAPH_KIND_PREDICT)
    made.inputs.add(value="x", spec=spec, batched=True)
    made.tensors.add(value="w", tensor="W")
    for name, target, read, output in (
        ("a", "aten.mul.Tensor", ["x", "w"], spec),
        ("p", SPLIT, ["a"], half),
        ("g", GATHER, ["p"], spec),
        ("c", COPY, ["g"], spec),
        ("l", CROSS_ENTROPY, ["c"], graph_pb2.ValueSpec(kind=graph_pb2.VALUE_KIND_TENSOR)),
    ):
        made.nodes.add(
            name=name, target=target, output=output, arguments=[graph_pb2.Argument(value=value) for value in read]
        )
    return index_graph(made, "predict", {"W": graph_pb2.TensorSpec(name="W")})


def test_each_operator_has_its_sizes() -> None:
    index = operators()
    found = exchanges(index, {"W"}, ROWS, 2)
    numbers = 4 * ROWS
    assert found == [
        Exchange(1, backward=True, gathers=True, size_bytes=WHOLE),
        Exchange(2, backward=False, gathers=True, size_bytes=WHOLE),
        Exchange(3, backward=True, gathers=False, size_bytes=WHOLE),
        Exchange(4, backward=False, gathers=False, size_bytes=numbers),
        Exchange(4, backward=False, gathers=False, size_bytes=2 * numbers),
    ]
    index.graph.nodes[1].no_grad = True
    assert [each.node for each in exchanges(index, {"W"}, ROWS, 2)] == [2, 3, 4, 4]


def test_seconds_are_rounds_and_bytes() -> None:
    add, gather = Exchange(0, False, False, 1200), Exchange(0, False, True, 1200)
    two, four = GroupLink(2, 1e3, 0.5), GroupLink(4, 1e3, 0.5)
    # Two swap all that they have; four send the sums of quarters around.
    assert (two.sent_bytes(add), four.sent_bytes(add)) == (1200, 1800)
    assert (two.sent_bytes(gather), four.sent_bytes(gather)) == (600, 900)
    assert (two.seconds(add), four.seconds(add)) == pytest.approx((1.7, 2.8))
    assert (two.seconds(gather), four.seconds(gather)) == pytest.approx((1.1, 1.4))
    assert four.gather_seconds(300) == four.seconds(gather)
    assert four.gather_bytes(300) == four.sent_bytes(gather)


def test_exchanges_are_part_of_the_costs_of_their_nodes() -> None:
    of = sharded(blocks_request(1))
    found = exchanges(of.indexed.train, trained_tensors(of.indexed.tensors), ROWS, 2)
    (plain,) = known(of, 1).costs
    made = with_exchanges(plain, found, LINK)
    each = 1e-4 + WHOLE / 1e8
    forward = {exchange.node for exchange in found if not exchange.backward}
    backward = {exchange.node for exchange in found if exchange.backward}
    for node in range(len(plain.forward)):
        assert made.forward[node] == pytest.approx(plain.forward[node] + each * (node in forward))
        assert made.input_gradient[node] == pytest.approx(plain.input_gradient[node] + each * (node in backward))
    assert (made.weight_gradient == plain.weight_gradient).all()
    assert plain.forward.max() == plain.forward.min()


def test_like_links_count_as_equal() -> None:
    near = [[LinkRate(1e8, 1.2e8, 1e-3)], [LinkRate(1.8e8, 1.5e8, 3e-3)], [LinkRate(1.4e8, 1.4e8, 2e-3)]]
    assert group_links(2, near) == [GroupLink(2, 1.4e8, 1e-3)] * 3
    # Of a group the slowest counts; what was not measured is as assumed.
    gone = Unreachable("no route")
    apart = group_links(3, [[LinkRate(1e9, 2e9, 1e-4), LinkRate(5e6, 8e6, 1e-2)], [gone], []])
    assumed = GroupLink(3, ASSUMED_LINK.forward, ASSUMED_LINK.round_trip_seconds / 2)
    assert apart == [GroupLink(3, 5e6, 5e-3), assumed, assumed]
    assert slowest_group(apart) == GroupLink(3, 5e6, 5e-3)


def test_what_comes_in_parts_is_brought_together_where_it_arrives() -> None:
    of = sharded(blocks_request(2))
    cut = of.new_cut(4)
    segments = make_segments(of.indexed, [cut], ROWS, Rates(1e9, 1e9), of.spread)
    train = segments.of_graph(graph_pb2.GRAPH_KIND_TRAIN)
    boundaries = Boundaries(of.indexed.train, train, (0, 1), ROWS, 2)
    ((value,),) = boundaries.spread
    assert value.size_bytes == WHOLE // 2
    gather = LINK.gather_seconds(WHOLE // 2)
    first, second = with_gathers([StageSeconds(1.0, 2.0)] * 2, boundaries, (0, 1), [LINK] * 2)
    assert (first.forward, first.backward) == pytest.approx((1.0, 2.0 + gather))
    assert (second.forward, second.backward) == pytest.approx((1.0 + gather, 2.0))
    assert with_gathers([StageSeconds(1.0, 2.0)] * 2, boundaries, (0, 1), []) == [StageSeconds(1.0, 2.0)] * 2
    found = exchanges(of.indexed.train, trained_tensors(of.indexed.tensors), ROWS, 2)
    assert group_bytes(found, boundaries, [LINK] * 2) == 4 * WHOLE + 2 * WHOLE // 2
    assert group_bytes(found, boundaries, []) == 0
    # Between stages of one server nothing travels.
    assert Boundaries(of.indexed.train, train, (0, 0), ROWS, 2).spread == [[]]
