"""Segments on their own: regions, boundaries, order of sums, randomness, failures (T2, T4, T5, T6, T8, T13)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from graph_driver import CPU, Chain, Outcome, assert_equal, eager
from graph_models import Dropping, LongSkip, Regions, cases, squared_loss, token_loss
from torch import nn

from gradwire.graph import export_model
from gradwire_protocol.errors import InternalError, ModelError
from gradwire_protocol.v1 import graph_pb2 as pb
from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.segment import BuiltSegment


def rows_of_six(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(rows, 6).double(), torch.randn(rows, 6).double()


def test_regions_are_inlined_and_marked() -> None:
    model = Regions(autocast=True)
    exported = export_model(model, squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    nodes = exported.proto.train.nodes
    linears = [node for node in nodes if node.target == "aten.linear.default"]
    assert [node.no_grad for node in linears] == [False, True, False, False, False]
    regions = [[(item.device_kind, item.enabled) for item in node.autocast] for node in linears]
    assert regions == [[], [], [], [("cpu", True)], [("cpu", True), ("cpu", False)]]
    assert any(node.no_grad and node.target == "aten.mul.Tensor" for node in nodes)
    assert not any("wrap_with" in node.target for node in nodes)


def test_autocast_regions_equal_the_model_wherever_they_are_cut() -> None:
    torch.manual_seed(0)
    model = Regions(autocast=True)
    batch = (torch.randn(3, 6), torch.randn(3, 6))
    exported = export_model(model, squared_loss, batch)
    expected = eager(model, squared_loss, batch)
    for cut in exported.proto.train.allowed_cuts:
        assert_equal(Chain(exported, [cut]).train(batch), expected, tolerance=1e-5)


def test_a_region_is_left_when_an_operator_fails() -> None:
    exported = export_model(Regions(autocast=True), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    chain = Chain(exported, [])
    (segment,) = chain.segments[pb.GRAPH_KIND_TRAIN]
    for region in ((True, []), (False, [True])):
        broken = stage_pb2.Segment.FromString(segment.SerializeToString())
        node = next(node for node in broken.nodes if (node.no_grad, [i.enabled for i in node.autocast]) == region)
        node.target = "aten.cat.default"
        del node.arguments[:]
        node.arguments.add().list.SetInParent()
        built = BuiltSegment(broken, chain.stores[0], CPU, 0)
        values = exported.flatten_batch((torch.randn(3, 6), torch.randn(3, 6)), pb.GRAPH_KIND_TRAIN).values
        with pytest.raises(ModelError, match=r"aten\.cat\.default"):
            built.forward(values, step=1, micro_batch=0, record=True)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_random_numbers_are_the_same_on_every_layout() -> None:
    torch.manual_seed(0)
    model = Dropping().double()
    batch = rows_of_six(5)
    exported = export_model(model, squared_loss, batch)

    def run(cuts: list[int], seed: int = 7, step: int = 1) -> Outcome:
        torch.manual_seed(torch.seed() % 1000)  # whatever state the process's generator is in
        return Chain(exported, cuts, seed).train(batch, micro_batches=2, step=step)

    allowed = list(exported.proto.train.allowed_cuts)
    whole = run([])
    for cuts in ([allowed[1]], [allowed[4], allowed[-2]], allowed[::3]):
        assert_equal(run(cuts), whole, tolerance=0.0)
    losses = {run([]).loss, run([], seed=8).loss, run([], step=2).loss}
    assert len(losses) == 3  # seed and step matter


def test_micro_batches_and_nodes_draw_different_numbers() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x) + torch.rand_like(x), torch.rand_like(x)

    x = torch.zeros(4, 6)
    exported = export_model(Noise(), lambda output, target: (output[0] + output[1]).mean(), (x, x))
    chain = Chain(exported, [])
    (segment,) = chain.segments[pb.GRAPH_KIND_PREDICT]
    made = [
        chain.built(segment).forward({"batch.input_0": x}, step=1, micro_batch=number, record=False).results
        for number in (0, 0, 1)
    ]
    first, again, other = [[tensor for tensor in item.values() if isinstance(tensor, torch.Tensor)] for item in made]
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    bias = exported.tensors["linear.bias"].detach()
    assert not torch.allclose(first[0] - bias, first[1])


def test_gradients_of_long_skips_are_summed_in_the_order_of_one_process() -> None:
    torch.manual_seed(0)
    model = LongSkip()  # float32: another order of sums would show
    x, y = torch.randn(16, 6), torch.randn(16, 6)
    exported = export_model(model, squared_loss, (x, y))
    whole = Chain(exported, []).train((x, y))
    allowed = list(exported.proto.train.allowed_cuts)
    for cuts in ([allowed[2], allowed[6], allowed[10]], allowed[::2]):
        assert_equal(Chain(exported, cuts).train((x, y)), whole, tolerance=0.0)


def test_transposed_boundaries_keep_their_strides() -> None:
    class Transposing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).view(-1, 2, 4).transpose(1, 2)
            y = torch.tanh(y).transpose(1, 2)
            part = y.transpose(1, 2)[:, :3]  # has gaps: travels contiguous, and the view below must copy
            y = y + part.transpose(1, 2).view(-1, 3).mean(1).view(-1, 2, 1)
            z = self.second(y.view(-1, 8).view(-1, 2, 4))  # a view that a contiguous copy would break
            return z.expand(2, -1, 2, 3).transpose(0, 1).flatten(1)

    model = Transposing().double()
    x, y = torch.randn(3, 6).double(), torch.randn(3, 12).double()
    exported = export_model(model, squared_loss, (x, y))
    expected = eager(model, squared_loss, (x, y))
    for cut in exported.proto.train.allowed_cuts:
        assert_equal(Chain(exported, [cut]).train((x, y)), expected)


def gelu_segment(**fields: Any) -> stage_pb2.Segment:
    node = pb.Node(name="y", target="aten.gelu.default", arguments=[pb.Argument(value="x")], module_path="act")
    defaults: dict[str, Any] = {
        "nodes": [node],
        "incoming": [stage_pb2.IncomingValue(value="x", producer_stage=0)],
        "outgoing": [stage_pb2.OutgoingValue(value="y", consumer_stages=[2])],
        "stage": 1,
    }
    return stage_pb2.Segment(**{**defaults, **fields})


def test_autocast_does_not_cache_the_cast_of_a_boundary() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.first(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.second(x) * self.third(x)
            return y.float()

    torch.manual_seed(0)
    batch = (torch.randn(8, 6), torch.randn(8, 6))
    exported = export_model(Twice(), squared_loss, batch)
    whole = Chain(exported, []).train(batch)
    for cut in exported.proto.train.allowed_cuts:
        assert_equal(Chain(exported, [cut]).train(batch), whole, tolerance=0.0)


def test_a_boundary_is_not_written_to_and_its_gradient_keeps_its_layout() -> None:
    built = BuiltSegment(gelu_segment(), {}, CPU, 0)
    x = torch.randn(2, 3).t().requires_grad_()
    made = built.forward({"x": x}, step=0, micro_batch=0, record=True)
    gradient = torch.ones(3, 2)  # contiguous, unlike x
    back = made.backward({"y": gradient}, {"x": torch.full((3, 2), 100.0)}, None)
    assert back["x"] is not None
    assert x.grad is None
    twin = x.detach().clone().requires_grad_()
    nn.functional.gelu(twin).sum().backward()
    assert twin.grad is not None
    torch.testing.assert_close(back["x"], twin.grad)  # not relayed: nobody reads x behind this segment
    relaying = stage_pb2.IncomingValue(value="x", producer_stage=0, gradient_from_stage=2)
    built = BuiltSegment(gelu_segment(incoming=[relaying]), {}, CPU, 0)
    made = built.forward({"x": x}, step=0, micro_batch=0, record=True)
    back = made.backward({"y": gradient}, {"x": torch.full((3, 2), 100.0)}, None)
    torch.testing.assert_close(back["x"], twin.grad + 100)
    assert made.backward({}, {}, None) == {"x": None}  # freed: nothing is left to go back through


def test_gradients_that_nobody_needs_are_none() -> None:
    exported = export_model(LongSkip(), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    chain = Chain(exported, [exported.proto.train.allowed_cuts[4]])
    last = chain.segments[pb.GRAPH_KIND_TRAIN][1]
    values: dict[str, Any] = {item.value: torch.randn(3, 6) for item in last.incoming}
    wanting = [item.value for item in last.incoming if not item.from_batch]
    for name in wanting:
        values[name].requires_grad_()
    made = chain.built(last).forward(values, step=0, micro_batch=0, record=True)
    back = made.backward({}, {}, None)
    assert back == dict.fromkeys(wanting)
    made = chain.built(last).forward(values, step=0, micro_batch=0, record=False)
    assert made.loss is not None
    assert not made.loss.requires_grad


def test_frozen_parameters_get_no_gradient() -> None:
    torch.manual_seed(0)
    model = LongSkip().double()
    model.layers[0].requires_grad_(False)
    model.layers[2].weight.requires_grad_(False)
    batch = rows_of_six(4)
    exported = export_model(model, squared_loss, batch)
    expected = eager(model, squared_loss, batch)
    assert "layers.0.weight" not in expected.gradients
    for cut in list(exported.proto.train.allowed_cuts)[::3]:
        assert_equal(Chain(exported, [cut]).train(batch), expected)


def test_a_failing_operator_is_named_with_its_place() -> None:
    case = cases()["gpt"]
    exported = export_model(case.model, token_loss, case.batch(2))
    tokens, targets = case.batch(2)
    tokens[0, 0] = 99
    with pytest.raises(ModelError) as caught:
        Chain(exported, [exported.cut_before("blocks.1")]).train((tokens, targets))
    message = str(caught.value)
    assert "Operator aten.embedding.default in module 'tokens'" in message
    assert "graph_models.py:" in message
    assert "x = self.tokens(tokens) + self.positions(" in message
    assert "index out of range" in message
    assert "vocabulary" in caught.value.remedy


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("aten.set_.source_Tensor", "not allowed"),
        ("aten.resize_.default", "not allowed"),
        ("aten.from_file.default", "not allowed"),
        ("aten.as_strided.default", "not allowed"),
        ("os.system", "not allowed"),
        ("python.eval", "not allowed"),
        ("aten.__class__.__init__", "not allowed"),
        ("", "not allowed"),
    ],
)
def test_only_allowed_operators_are_built(target: str, message: str) -> None:
    node = pb.Node(name="y", target=target, arguments=[pb.Argument(value="x")])
    with pytest.raises(ModelError, match=message):
        BuiltSegment(gelu_segment(nodes=[node]), {}, CPU, 0)


def test_names_and_texts_are_data_even_where_they_look_like_code() -> None:
    name = "y = 1\nraise SystemExit #"
    rounding = pb.NamedArgument(name="rounding_mode", value=pb.Argument(text="floor"))
    node = pb.Node(name=name, target="aten.div.Tensor_mode", keyword_arguments=[rounding])
    node.arguments.extend([pb.Argument(value="x"), pb.Argument(value="x")])
    segment = gelu_segment(nodes=[node], outgoing=[stage_pb2.OutgoingValue(value=name, consumer_stages=[2])])
    made = BuiltSegment(segment, {}, CPU, 0).forward({"x": torch.ones(2)}, step=0, micro_batch=0, record=False)
    assert torch.equal(made.outgoing[name], torch.ones(2))  # type: ignore[arg-type]
    rounding.value.text = "'); raise SystemExit #"
    node.keyword_arguments[0].CopyFrom(rounding)
    segment = gelu_segment(nodes=[node], outgoing=[stage_pb2.OutgoingValue(value=name, consumer_stages=[2])])
    with pytest.raises(ModelError, match="failed"):
        BuiltSegment(segment, {}, CPU, 0).forward({"x": torch.ones(2)}, step=0, micro_batch=0, record=False)


def test_malformed_segments_are_refused() -> None:
    def node(name: str, *arguments: pb.Argument) -> pb.Node:
        return pb.Node(name=name, target="aten.relu.default", arguments=arguments)

    x = pb.Argument(value="x")
    deep = x
    for _ in range(20):
        deep = pb.Argument(list=pb.ArgumentList(items=[deep]))
    for bad, message in [
        (gelu_segment(nodes=[node("y", pb.Argument(value="nowhere"))]), "'nowhere', read by y"),
        (gelu_segment(nodes=[node("y", x), node("y", x)]), "'y' is made twice"),
        (gelu_segment(nodes=[node("x", x)]), "'x' is made twice"),
        (gelu_segment(nodes=[node("z", x)]), "'y', read by its outputs"),
        (gelu_segment(nodes=[node("y", pb.Argument())]), "of kind 'None'"),
        (gelu_segment(nodes=[node("y", pb.Argument(data_type=99))]), "number 99"),  # type: ignore[arg-type]
        (gelu_segment(nodes=[node("y", deep)]), "kind 'list'"),
        (gelu_segment(tensors=[pb.TensorUse(value="w", tensor="weight")]), "does not hold"),
    ]:
        with pytest.raises(ModelError, match=message):
            BuiltSegment(bad, {}, CPU, 0)
    with pytest.raises(InternalError, match="without its incoming values x"):
        BuiltSegment(gelu_segment(), {}, CPU, 0).forward({}, step=0, micro_batch=0, record=True)


def test_devices_are_replaced_and_undefined_memory_is_zero() -> None:
    arguments = [pb.Argument(list=pb.ArgumentList(items=[pb.Argument(integer=1000)]))]
    keywords = [
        pb.NamedArgument(name="device", value=pb.Argument(device_kind="cuda")),
        pb.NamedArgument(name="pin_memory", value=pb.Argument(boolean=True)),
        pb.NamedArgument(name="memory_format", value=pb.Argument(none=pb.Nothing())),
    ]
    node = pb.Node(name="y", target="aten.empty.memory_format", arguments=arguments, keyword_arguments=keywords)
    made = BuiltSegment(gelu_segment(nodes=[node]), {}, CPU, 0).forward({"x": 1}, step=0, micro_batch=0, record=False)
    value = made.outgoing["y"]
    assert isinstance(value, torch.Tensor)
    assert torch.equal(value, torch.zeros(1000))


def test_importing_the_segment_imports_no_compiler() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import gradwire_stage.segment; "
        "slow = ('torch._dynamo', 'torch.export', 'sympy'); "
        "print(*(name for name in set(sys.modules) - before if name.startswith(slow)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
