"""Segments: routes of values, places of tensors, and the cuts of the graphs that follow."""

from __future__ import annotations

import itertools

import pytest
from graph_text import chain_model, graph, model, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_coordinator.costs import Rates
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.segments import Segments, make_segments
from gradwire_protocol.errors import ModelError, PlanError
from gradwire_protocol.v1 import graph_pb2, stage_pb2

TRAIN, EVALUATE, PREDICT = (
    graph_pb2.GRAPH_KIND_TRAIN,
    graph_pb2.GRAPH_KIND_EVALUATE,
    graph_pb2.GRAPH_KIND_PREDICT,
)
RATES = Rates(flops_per_second=1e9, bytes_per_second=1e9)


def cut(wanted: graph_pb2.Model, *cuts: int) -> Segments:
    return make_segments(check_model(wanted), cuts, rows=2, rates=RATES)


def routes(segment: stage_pb2.Segment) -> dict[str, tuple[object, ...]]:
    """Value -> "batch", or (producer, gradient goes to, gradient comes from)."""
    return {
        value.value: ("batch",)
        if value.from_batch
        else (
            value.producer_stage,
            value.gradient_to_stage,
            value.gradient_from_stage if value.HasField("gradient_from_stage") else None,
        )
        for value in segment.incoming
    }


def holders(segments: Segments) -> dict[str, list[int]]:
    return {placement.spec.name: list(placement.holder_stages) for placement in segments.placements}


def names(segment: stage_pb2.Segment) -> list[str]:
    return [node.name for node in segment.nodes]


def test_gradients_go_back_along_the_chain_of_consumers() -> None:
    skip = graph(
        "train",
        """
        input x
        a = f(x)
        b = g(a)
        c = g(b, a)
        d = g(c)
        loss = h(d, a)
        output loss
        """,
    )
    train = cut(model([], skip), 1, 2, 3).of_graph(TRAIN)
    # a is made by stage 0 and read by 1, 2 and 3 (with the loss); its gradient goes 3 → 2 → 1 → 0.
    assert {v.value: list(v.consumer_stages) for v in train[0].outgoing} == {"a": [1, 2, 3]}
    assert routes(train[1])["a"] == (0, 0, 2)
    assert routes(train[2]) == {"b": (1, 1, None), "a": (0, 1, 3)}
    assert routes(train[3]) == {"c": (2, 2, None), "a": (0, 2, None)}
    assert routes(train[0]) == {"x": ("batch",)}
    assert [segment.loss for segment in train.values()] == ["", "", "", "loss"]


def test_values_that_are_spread_say_so_at_both_ends() -> None:
    text = "input x\na = f(x)\nb = f(a)\nc = f(a, b)\noutput c"
    made = check_model(model([], graph("train", text), graph("evaluate", text)))
    spread = {graph_pb2.GRAPH_KIND_TRAIN: {"x": 1, "a": 1, "c": 1}}
    segments = make_segments(made, [1, 2], rows=2, rates=RATES, spread=spread)
    for kind, expected in ((graph_pb2.GRAPH_KIND_TRAIN, {"a": 1}), (graph_pb2.GRAPH_KIND_EVALUATE, {})):
        found = [
            (value.value, value.spread_dimension if value.HasField("spread_dimension") else None)
            for segment in segments.of_graph(kind).values()
            for value in (*segment.incoming, *segment.outgoing)
        ]
        assert found
        assert all(dimension == expected.get(value) for value, dimension in found)


def test_the_last_stage_takes_a_loss_and_weight_that_others_make() -> None:
    weighted = graph(
        "train",
        """
        input x
        input mask
        weight = count(mask)
        a = f(x)
        loss = g(a, weight)
        rest = aside(a)
        output loss
        output weight
        """,
    )
    train = cut(model([], weighted), 1, 3).of_graph(TRAIN)
    assert (train[2].loss, train[2].loss_weight) == ("loss", "weight")
    assert routes(train[2]) == {"a": (1, 1, None), "loss": (1, 1, None), "weight": (0, 1, None)}
    assert {v.value: list(v.consumer_stages) for v in train[0].outgoing} == {"weight": [1, 2]}


def test_a_loss_weight_straight_from_the_batch() -> None:
    weighted = graph("train", "input x\ninput w\na = f(x)\nloss = g(a)\noutput loss\noutput w")
    train = cut(model([], weighted), 1).of_graph(TRAIN)
    assert routes(train[1]) == {"a": (0, 0, None), "w": ("batch",)}
    assert train[1].loss_weight == "w"


def test_tied_tensors_are_held_by_all_that_read_them() -> None:
    tied = graph(
        "train",
        "input x\ntensor e = E\ntensor head = E\ntensor w = W\n"
        "a = embedding(x, e)\nb = linear(a, w)\nloss = linear(b, head)\noutput loss",
    )
    segments = cut(model([tensor("E"), tensor("W"), tensor("unused")], tied), 1, 2)
    assert holders(segments) == {"E": [0, 2], "W": [1]}
    assert segments.tied_servers((0, 1, 2)) == {0, 2}
    # Nobody else holds it where the stages that do are on one server.
    assert segments.tied_servers((0, 1, 0)) == set()
    assert [[item.spec.name for item in segments.held_by(server, (0, 1, 0))] for server in (0, 1)] == [["E"], ["W"]]
    assert [[use.value for use in stage[0].tensors] for stage in segments.stages] == [["e"], ["w"], ["head"]]


def test_frozen_tensors_on_two_stages_need_no_exchange() -> None:
    table = tensor("table", "buffer")
    shared = graph("train", "input x\ntensor t = table\na = f(x, t)\nloss = f(a, t)\noutput loss")
    segments = cut(model([table], shared), 1)
    assert holders(segments) == {"table": [0, 1]}
    assert segments.tied_servers((0, 1)) == frozenset()


def test_other_graphs_are_cut_where_the_tensors_are() -> None:
    """The evaluate graph has other nodes than the train graph: its cuts fall between the parameters' uses."""
    train = graph(
        "train",
        "input x\ntensor v = V\ntensor w = W\n"
        "a = linear(x, v)\nd = dropout(a)\nb = linear(d, w)\nloss = mean(b)\noutput loss",
    )
    evaluate = graph(
        "evaluate",
        "input x\ntensor v = V\ntensor w = W\n"
        "p = cast(x)\nq = linear(p, v)\nb = linear(q, w)\nloss = mean(b)\noutput loss",
    )
    predict = graph(
        "predict", "input x\ntensor v = V\ntensor w = W\nq = linear(x, v)\nb = linear(q, w)\noutput q\noutput b"
    )
    segments = cut(model([tensor("V"), tensor("W")], train, evaluate, predict), 2)
    assert segments.cuts == {TRAIN: (2,), EVALUATE: (2,), PREDICT: (1,)}
    assert holders(segments) == {"V": [0], "W": [1]}
    assert [names(segment) for segment in segments.of_graph(EVALUATE).values()] == [["p", "q"], ["b", "loss"]]
    results = {stage: [r.value for r in segment.results] for stage, segment in segments.of_graph(PREDICT).items()}
    assert results == {0: ["q"], 1: ["b"]}


def test_where_no_window_exists_the_reader_holds_a_copy() -> None:
    train = graph("train", "input x\ntensor v = V\ntensor w = W\na = linear(x, v)\nloss = linear(a, w)\noutput loss")
    swapped = graph(
        "evaluate", "input x\ntensor v = V\ntensor w = W\na = linear(x, w)\nloss = linear(a, v)\noutput loss"
    )
    segments = cut(model([tensor("V"), tensor("W", elements=64)], train, swapped), 1)
    # One of the two must be read by the stage that does not own it; the smaller one is copied.
    assert holders(segments) == {"V": [0, 1], "W": [1]}
    assert segments.tied_servers((0, 1)) == {0, 1}


def test_a_stage_may_have_nothing_to_do_in_a_graph() -> None:
    train = graph(
        "train", "input x\ntensor w = W\na = linear(x, w)\nb = dropout(a)\nc = noise(b)\nloss = mean(c)\noutput loss"
    )
    evaluate = graph("evaluate", "input x\ntensor w = W\na = linear(x, w)\nloss = mean(a)\noutput loss")
    segments = cut(model([tensor("W")], train, evaluate), 1, 2, 3)
    found = segments.of_graph(EVALUATE)
    assert sorted(itertools.chain(*map(names, found.values()))) == ["a", "loss"]
    assert len(found) < 4
    assert found[3].loss == "loss"  # the last stage has the loss, even if it computes nothing


def test_no_stage_stays_empty_where_there_are_enough_cuts() -> None:
    """The evaluate graph lacks the nodes around which the train graph is cut, so its nearest cut is the same twice."""
    train = graph("train", "input x\na = f(x)\nb = drop(a)\nc = drop(b)\nd = drop(c)\ne = g(d)\noutput e")
    evaluate = graph("evaluate", "input x\na = f(x)\nc = cast(a)\ne = g(c)\noutput e")
    found = cut(model([], train, evaluate), 1, 2).of_graph(EVALUATE)
    assert [names(segment) for segment in found.values()] == [["a"], ["c"], ["e"]]


def test_buffers_that_change_stay_with_their_owner() -> None:
    text = (
        "input x\ntensor w = W\ntensor m = mean\ntensor m2 = mean\n"
        "a = linear(x, w)\nb = norm(a, m)\nn = update(m2, a)\nloss = mean(b)\nupdate n -> mean\noutput loss"
    )
    train = graph("train", text)
    indexed = check_model(model([tensor("W"), tensor("mean", "buffer")], train))
    # Cutting between the read (node 1) and the update (node 2) would give the buffer two owners.
    assert indexed.train.usable_cuts(indexed.mutated) == [1, 3]
    segments = make_segments(indexed, (1,), rows=2, rates=RATES)
    assert holders(segments) == {"W": [0], "mean": [1]}
    assert [list(stage[0].buffer_updates) != [] for stage in segments.stages] == [False, True]


def test_a_changing_buffer_that_evaluation_reads_elsewhere_is_refused() -> None:
    train = graph(
        "train", "input x\ntensor m = mean\ntensor w = W\na = norm(x, m)\nloss = linear(a, w)\nmutate mean\noutput loss"
    )
    evaluate = graph(
        "evaluate",
        "input x\ntensor m = mean\ntensor c = count\ntensor w = W\na = norm(x, c)\nloss = norm(a, m)\noutput loss",
    )
    later = graph(
        "train",
        "input x\ntensor m = mean\ntensor c = count\na = norm(x, m)\nloss = norm(a, c)\n"
        "mutate mean\nmutate count\noutput loss",
    )
    tensors = [tensor("W"), tensor("mean", "buffer"), tensor("count", "buffer")]
    cut(model(tensors, train, evaluate), 1)  # all of evaluation can run where the buffer is
    with pytest.raises(PlanError, match="evaluate graph cannot be cut") as caught:
        cut(model(tensors, later, evaluate), 1)
    assert "mean (stage 0)" in caught.value.got


def test_inputs_that_an_operator_writes_to_stay_on_one_stage() -> None:
    written = graph("train", "input x\na = add_(x)\nb = f(x)\nloss = g(b)\noutput loss")
    written.mutated_inputs.append("x")
    assert check_model(model([], written)).train.usable_cuts([]) == [2]


def test_a_tuple_does_not_travel() -> None:
    pair = graph("train", "input x\na = split(x)\nloss = getitem(a)\noutput loss")
    pair.nodes[0].output.kind = graph_pb2.VALUE_KIND_TUPLE
    with pytest.raises(ModelError, match="a crosses the cut before stage 1"):
        cut(model([], pair), 1)


def test_results_that_no_node_makes() -> None:
    train = graph("train", "input x\ntensor w = W\na = f(x)\nloss = g(a, w)\noutput loss")
    predict = graph("predict", "input x\ntensor w = W\na = f(x)\nb = g(a, w)\noutput x\noutput w\noutput b\noutput b")
    found = cut(model([tensor("W")], train, None, predict), 1).of_graph(PREDICT)
    assert [[r.value for r in found[stage].results] for stage in (0, 1)] == [["x"], ["w", "b"]]
    assert routes(found[0]) == {"x": ("batch",)}


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_node_runs_once_and_every_value_arrives(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 9))
    wanted = chain_model(count)
    for made in (wanted.train, wanted.evaluate, wanted.predict):
        for position, node in enumerate(made.nodes):  # extra reads of earlier values
            for earlier in data.draw(st.lists(st.integers(0, max(0, position - 1)), max_size=2)) if position else []:
                node.arguments.add(value=made.nodes[earlier].name)
    cuts = data.draw(st.lists(st.sampled_from(range(1, count + 1)), unique=True).map(sorted))
    segments = cut(wanted, *cuts)
    placed = holders(segments)
    for kind, made in ((TRAIN, wanted.train), (EVALUATE, wanted.evaluate), (PREDICT, wanted.predict)):
        found = segments.of_graph(kind)
        assert [name for stage in sorted(found) for name in names(found[stage])] == [node.name for node in made.nodes]
        uses = {use.value: use.tensor for use in made.tensors}
        for stage, segment in found.items():
            known = {value.value for value in segment.incoming} | {use.value for use in segment.tensors}
            for node in segment.nodes:
                assert {argument.value for argument in node.arguments} <= known
                known.add(node.name)
            assert all(stage in placed[uses[use.value]] for use in segment.tensors)
            for value in segment.incoming:
                if value.from_batch:
                    continue
                producer = found[value.producer_stage]
                consumers = next(list(o.consumer_stages) for o in producer.outgoing if o.value == value.value)
                chain = [value.producer_stage, *consumers]
                place = chain.index(stage)
                assert value.gradient_to_stage == chain[place - 1]
                assert [value.gradient_from_stage] * value.HasField("gradient_from_stage") == chain[
                    place + 1 : place + 2
                ]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: m.train.nodes[1].arguments.add(value="nowhere"), "reads a value that nothing before it makes"),
        (lambda m: m.train.nodes[0].arguments.add(value="n1"), "reads a value that nothing before it makes"),
        (lambda m: m.train.nodes.add(name="n0"), "defines a value twice"),
        (lambda m: m.train.allowed_cuts.append(1), "allowed cuts"),
        (lambda m: m.train.allowed_cuts.append(99), "allowed cuts"),
        (lambda m: m.train.tensors.add(value="w", tensor="none such"), "does not have"),
        (lambda m: m.train.ClearField("nodes"), "number of nodes"),
        (lambda m: m.ClearField("evaluate"), "no evaluate graph"),
        (lambda m: m.ClearField("loss_form"), "loss means"),
        (lambda m: m.train.outputs.add(value="n0"), "number of outputs"),
        (lambda m: m.tensors.add(name="W0", kind=1, data_type=1), "there twice"),
        (lambda m: m.tensors.add(name="new", kind=1, data_type=1, shape=[-1]), "impossible shape"),
        (lambda m: setattr(m.predict, "kind", TRAIN), "another kind"),
        (lambda m: m.train.buffer_updates.add(value="x", tensor="W0"), "not made by a node"),
    ],
)
def test_models_that_are_none_are_refused(break_it: object, message: str) -> None:
    wanted = chain_model(3)
    break_it(wanted)  # type: ignore[operator]
    with pytest.raises(Exception, match=message):
        check_model(wanted)
