"""Exported models: names, ties, three graphs, structures of batches and outputs, costs, the user's model untouched."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from graph_driver import Chain, assert_equal, eager
from graph_models import GPT, Case, Counting, Dropping, Masked, ResidualNet, cases, squared_loss, token_loss
from torch import nn

import gradwire.graph.exported
from gradwire.graph import ExportedModel, export_model, unbatched
from gradwire.graph.capture import Captured
from gradwire_protocol.errors import BatchError, ModelError, PlanError
from gradwire_protocol.v1 import graph_pb2 as pb


@pytest.fixture(scope="module")
def gpt() -> tuple[GPT, ExportedModel]:
    torch.manual_seed(0)
    model = GPT().double()
    tokens = torch.randint(0, 11, (2, 6))
    return model, export_model(model, token_loss, (tokens, tokens))


def test_graphs_survive_the_wire(gpt: tuple[GPT, ExportedModel]) -> None:
    proto = gpt[1].proto
    assert pb.Model.FromString(proto.SerializeToString()) == proto
    tokens = torch.randint(0, 11, (2, 6))
    assert export_model(gpt[0], token_loss, (tokens, tokens)).proto == proto  # nothing in it is by chance


def test_special_numbers_survive_the_wire() -> None:
    def strange(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.masked_fill(x > 1, -math.inf).nan_to_num(nan=math.nan, neginf=-(2.0**60))
        return squared_loss(x.clamp(-1, 1), y) + torch.full((), 2**62, dtype=torch.int64) * 0.0

    x, y = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    model = nn.Linear(6, 6).double()
    exported = export_model(model, strange, (x, y))
    chain = Chain(exported, [exported.proto.train.allowed_cuts[-1]])
    assert_equal(chain.train((x, y)), eager(model, strange, (x, y)))


def test_tied_names_are_one_tensor(gpt: tuple[GPT, ExportedModel]) -> None:
    model, exported = gpt
    specs = {spec.name: spec for spec in exported.proto.tensors}
    assert list(specs) == [name for name, _ in model.named_parameters()]
    assert list(specs["tokens.weight"].names) == ["tokens.weight", "head.weight"]
    assert exported.tensors["tokens.weight"] is model.tokens.weight
    cut = exported.cut_before("blocks.1")
    chain = Chain(exported, [cut])
    assert chain.placements["tokens.weight"] == [0, 1]


def test_cut_before_a_module(gpt: tuple[GPT, ExportedModel]) -> None:
    exported = gpt[1]
    nodes = exported.proto.train.nodes
    cut = exported.cut_before("blocks.1")
    assert cut in exported.proto.train.allowed_cuts
    assert not any(node.module_path.startswith("blocks.1") for node in nodes[:cut])
    assert nodes[cut].module_path == "blocks.1.norm1"
    with pytest.raises(PlanError, match=r"No module 'blocks\.7'"):
        exported.cut_before("blocks.7")
    with pytest.raises(PlanError, match="cannot be cut at or before module 'tokens'"):
        exported.cut_before("tokens")


def test_nodes_say_where_they_come_from(gpt: tuple[GPT, ExportedModel]) -> None:
    nodes = {node.name: node for node in gpt[1].proto.train.nodes}
    attention = nodes["scaled_dot_product_attention_1"]
    assert attention.module_path == "blocks.1"
    assert attention.source.startswith("graph_models.py:")
    assert attention.source.endswith("mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)")
    assert "token_loss" in nodes["cross_entropy_loss"].source


def test_costs_and_shapes_are_affine_in_the_rows(gpt: tuple[GPT, ExportedModel]) -> None:
    nodes = {node.name: node for node in gpt[1].proto.train.nodes}
    linear = nodes["linear"]  # (rows, 6, 8) by (24, 8)
    assert [(size.fixed, size.per_row) for size in linear.output.shape] == [(0, 1), (6, 0), (24, 0)]
    assert (linear.flops.fixed, linear.flops.per_row) == (0, 2 * 6 * 8 * 24)
    assert linear.bytes.per_row == 8 * (6 * 8 + 6 * 24)
    assert linear.bytes.fixed == 8 * (8 * 24 + 24)
    attention = nodes["scaled_dot_product_attention"]
    assert attention.flops.per_row == 2 * (2 * 2 * 6 * 6 * 4)  # two products, two heads, time 6, head width 4
    flat = next(node for node in nodes.values() if node.target.startswith("aten.flatten"))
    assert flat.output.shape[0].per_row == 6


def test_recurrent_costs_count_every_weight_once_a_step() -> None:
    model = nn.LSTM(4, 5, batch_first=True).double()
    x = torch.randn(2, 3, 4).double()
    exported = export_model(
        model, lambda output, target: squared_loss(output[0], target), (x, torch.zeros(2, 3, 5).double())
    )
    (node,) = [node for node in exported.proto.train.nodes if node.target == "aten.lstm.input"]
    assert (node.flops.fixed, node.flops.per_row) == (0, 2 * 3 * (4 * 5 * 4 + 4 * 5 * 5))


def test_training_and_evaluation_are_graphs_of_their_own() -> None:
    case = cases()["residual"]
    batch = case.batch(4)
    exported = export_model(case.model, case.loss, batch)
    assert "aten.add_.Tensor" in {node.target for node in exported.proto.train.nodes}
    assert list(exported.proto.train.mutated_tensors)
    assert not list(exported.proto.evaluate.mutated_tensors)
    reference = ResidualNet().double()
    reference.load_state_dict(case.model.state_dict())
    reference.eval()
    with torch.no_grad():
        output = reference(batch[0])
        expected = float(F.cross_entropy(output, batch[1]))
    for cut in list(exported.proto.train.allowed_cuts)[::4]:
        chain = Chain(exported, [cut])
        assert chain.evaluate(batch) == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(chain.predict((batch[0],)), output, rtol=1e-12, atol=1e-12)


def test_dropout_is_in_the_train_graph_only() -> None:
    exported = export_model(Dropping(), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    assert any(node.random for node in exported.proto.train.nodes)
    assert not any(node.random for node in exported.proto.evaluate.nodes)


def test_predictions_come_in_the_models_own_structure() -> None:
    case = cases()["masked"]
    exported = export_model(case.model, case.loss, case.batch(3))
    *inputs, _ = case.batch(2)
    predicted = Chain(exported, [exported.proto.train.allowed_cuts[3]]).predict(tuple(inputs))
    expected = case.model.eval()(inputs[0], inputs[1].tensor, inputs[2])
    assert predicted.keys() == expected.keys()
    assert (predicted["nothing"], predicted["count"]) == (None, 3)
    torch.testing.assert_close(predicted["y"], expected["y"])
    assert [output.batched for output in exported.proto.predict.outputs] == [True, False, False]


def test_a_loss_that_changes_the_output_in_place_does_not_change_predictions() -> None:
    def rude(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.sub_(target) ** 2).mean()

    model = nn.Linear(6, 6)
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    exported = export_model(model, rude, (x, y))
    torch.testing.assert_close(Chain(exported, [1]).predict((x,)), model(x))


def test_the_users_model_is_not_changed() -> None:
    model = Counting()
    model.second.eval()
    model.first.register_forward_hook(lambda module, inputs, output: output * 1.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(3, 6)
    kept = x.clone()
    exported = export_model(model, lambda output, target: squared_loss(output.mul_(1), target), (x, x))
    assert model.training
    assert not model.second.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.first._forward_hooks) == 1
    assert torch.equal(x, kept)
    assert exported.tensors["count"] is model.count
    model(x)  # still a model of real tensors
    assert "aten.mul.Tensor" in {node.target for node in exported.proto.train.nodes}  # the hook is part of the graph


@pytest.mark.parametrize(
    ("loss", "exports"),
    [
        (F.mse_loss, 2),  # hands the output to broadcast_tensors, which gives it back
        (lambda output, target: (output.to(output.dtype).contiguous() - target).square().mean(), 2),
        (lambda output, target: (output.sub_(target) ** 2).mean(), 3),
    ],
)
def test_predictions_are_exported_apart_only_where_the_loss_changes_the_output(
    monkeypatch: pytest.MonkeyPatch, loss: Any, exports: int
) -> None:
    made = []
    capture = gradwire.graph.exported.capture

    def counted(*arguments: Any, **settings: Any) -> Captured:
        made.append(capture(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(gradwire.graph.exported, "capture", counted)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 3)
    exported = export_model(model, loss, (x, x))
    assert len(made) == exports
    torch.testing.assert_close(Chain(exported, [1]).predict((x,)), model(x))
    torch.testing.assert_close(Chain(exported, [1]).evaluate((x, x)), loss(model(x), x).item())


def test_state_kept_on_the_module_does_not_leak_fake_tensors() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.last: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.linear(x)
            return self.last

    model = Keeping()
    export_model(model, squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    assert model.last is None


def test_modes_that_the_user_froze_stay_in_the_train_graph() -> None:
    model = ResidualNet()
    model.norms[0].eval()
    batch = cases()["residual"].batch(4)
    exported = export_model(model, F.cross_entropy, (batch[0].float(), batch[1]))
    mutated = set(exported.proto.train.mutated_tensors)
    assert "norm.running_mean" in mutated
    assert "norms.0.running_mean" not in mutated


def test_a_model_on_the_meta_device_is_exported_without_its_weights() -> None:
    batch = (torch.randint(0, 11, (2, 6)), torch.randint(0, 11, (2, 6)))
    with torch.device("meta"):
        model = GPT()
    exported = export_model(model, token_loss, batch)
    assert all(tensor.is_meta for tensor in exported.tensors.values())
    assert exported.proto == export_model(GPT(), token_loss, batch).proto
    # Moved, not built there: transformers, once used, has torch.linspace make real tensors under torch.device("meta").
    empty = Counting().to("meta")
    with pytest.raises(ModelError, match=r"on the meta device and in no checkpoint.*: table"):
        export_model(empty, squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))


def test_a_model_that_returns_its_own_loss() -> None:
    class Output(dict[str, Any]):
        """Attribute access, as in Hugging Face's outputs."""

        __getattr__ = dict.__getitem__

    class OwnLoss(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.linear, self.wrap = nn.Linear(6, 3), wrap

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
            return self.wrap(F.cross_entropy(self.linear(inputs), labels))

    batch = {"inputs": torch.randn(4, 6), "labels": torch.tensor([0, -100, 2, -100])}
    for wrap in (lambda loss: loss, lambda loss: {"loss": loss, "rest": 1}, lambda loss: Output(loss=loss)):
        model = OwnLoss(wrap)
        exported = export_model(model, None, batch)
        assert not exported.proto.HasField("predict")
        assert [item.label for item in exported.proto.train.inputs] == ["inputs", "labels"]
        outcome = Chain(exported, [1]).train(batch, micro_batches=3)
        expected = F.cross_entropy(model.linear(batch["inputs"]), batch["labels"])
        assert outcome.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    with pytest.raises(ModelError, match="loss is not a scalar"):
        export_model(OwnLoss(lambda loss: "text"), None, batch)


def test_a_dict_is_given_as_keyword_arguments_and_a_target() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, *, extra: dict[str, torch.Tensor], flag: bool = False) -> torch.Tensor:
            return self.linear(x) + extra["a"] if flag else self.linear(x)

    batch = {"x": torch.randn(3, 6), "extra": {"a": torch.randn(3, 6)}, "flag": True, "target": torch.randn(3, 6)}
    exported = export_model(Named(), squared_loss, batch)
    labels = {item.label for item in exported.proto.train.inputs}
    assert labels == {"x", "extra['a']", "target"}
    outcome = Chain(exported, [1]).train(batch)
    model = Named()
    model.load_state_dict({name: tensor.detach() for name, tensor in exported.tensors.items()})
    expected = squared_loss(model(batch["x"], extra=batch["extra"], flag=True), batch["target"])
    assert outcome.loss == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_loss_module_brings_its_tensors_and_a_regulariser_sees_the_parameters() -> None:
    model = nn.Linear(6, 3).double()
    x, y = torch.randn(4, 6).double(), torch.tensor([0, 1, 2, 1])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]).double())
    exported = export_model(model, weighted, (x, y))
    assert {spec.name for spec in exported.proto.tensors} == {"weight", "bias", "loss.weight"}

    def regularised(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target) + 0.1 * (model.weight**2).sum()

    exported = export_model(model, regularised, (x, y))
    regularised(model(x), y).backward()
    outcome = Chain(exported, [1]).train((x, y))
    torch.testing.assert_close(outcome.gradients["weight"], model.weight.grad)


def test_structures_that_pytree_knows_are_taken() -> None:
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, pair: Pair, more: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
            return self.linear(pair.a + pair.b), [more[0] * 2]

    x = torch.randn(3, 6)
    exported = export_model(
        Sums(), lambda output, target: squared_loss(output[0] + output[1][0], target), (Pair(x, x), [x], x)
    )
    first, second = Chain(exported, [1]).predict((Pair(x, x), [x]))
    torch.testing.assert_close(second[0], x * 2)
    assert first.shape == x.shape


def test_flat_batches_are_checked() -> None:
    mask = torch.zeros(6, dtype=torch.bool)
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    exported = export_model(
        Masked(), lambda output, target: squared_loss(output["y"], target), (x, unbatched(mask), 2.0, y)
    )
    train = pb.GRAPH_KIND_TRAIN
    flat = exported.flatten_batch((x[:2], mask, 2.0, y[:2]), train)
    assert flat.rows == 2
    assert flat.batched == {"batch.input_0", "batch.target"}
    assert set(flat.values) == {"batch.input_0", "batch.input_1", "batch.target"}
    bad: list[tuple[Any, str]] = [
        ((x.double(), mask, 2.0, y), "input 0 has another dtype"),
        ((x, mask, 2.0, torch.randn(3, 5)), r"target has another shape.*\(rows, 6\).*\(3, 5\)"),
        ((x, mask[:4], 2.0, y), "input 1 has another shape"),
        ((x, mask, 3.0, y), "input 2 differs from the example"),
        ((x, mask, 2.0, y[:2]), "different or no rows"),
        ((x[:0], mask, 2.0, y[:0]), "different or no rows"),
        ((x, mask, y), "built differently"),
        ((x,), "no target"),
        ((1.0, mask, 2.0, y), "input 0 is not a tensor"),
        (x, "no target"),
    ]
    for batch, message in bad:
        with pytest.raises(BatchError, match=message):
            exported.flatten_batch(batch, train)
    with pytest.raises(BatchError, match="without its target"):
        exported.flatten_batch((x, mask, 2.0, y), pb.GRAPH_KIND_PREDICT)


def test_examples_that_cannot_be_used() -> None:
    x = torch.randn(3, 6)
    for example, message in [
        ((x,), "no target"),
        ({"x": x}, "no target"),
        ((x, torch.randn(2, 6)), "do not share a batch dimension"),
        ((torch.tensor(1.0), torch.tensor(2.0)), "do not share a batch dimension"),
        ((x, object()), "cannot be part of a batch"),
    ]:
        with pytest.raises(ModelError, match=message):
            export_model(nn.Linear(6, 6), squared_loss, example)


def test_all_cases_take_any_number_of_rows() -> None:
    case: Case = cases()["sizes"]
    exported = export_model(case.model, case.loss, case.batch(2))
    for rows in (1, 2, 7):
        batch = case.batch(rows)
        assert_equal(
            Chain(exported, [exported.proto.train.allowed_cuts[-4]]).train(batch), eager(case.model, case.loss, batch)
        )


def test_a_loss_that_is_not_a_number_on_one_row_tells_nothing() -> None:
    """The first row's labels are all ignored: its mean is over nothing."""
    labels = torch.tensor([[-100, -100], [1, 2]])
    exported = export_model(nn.Linear(6, 3), token_loss, (torch.randn(2, 2, 6), labels))
    assert exported.proto.loss_form == pb.LOSS_FORM_SUM_AND_WEIGHT
