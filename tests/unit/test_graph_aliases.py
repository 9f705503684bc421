"""In-place operators and buffers: where cuts may fall, what is dropped, which version a pass sees (T3, T7)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_driver import CPU, Chain, assert_equal, eager, whole_segment
from graph_models import Counting, ResidualNet, cases, squared_loss
from torch import nn

from gradwire.graph import ExportedModel, export_model
from gradwire_protocol.v1 import graph_pb2 as pb
from gradwire_stage.segment import BuiltSegment


def exported_case(name: str) -> ExportedModel:
    case = cases()[name]
    return export_model(case.model, case.loss, case.batch(4))


def test_no_cut_between_a_value_and_its_change_in_place() -> None:
    exported = exported_case("in_place")
    nodes, cuts = exported.proto.train.nodes, set(exported.proto.train.allowed_cuts)
    position = {node.name: index for index, node in enumerate(nodes)}
    first_linear, last_write = position["linear"], position["mul__1"]
    assert not cuts.intersection(range(first_linear + 1, last_write + 1))
    assert position["linear_2"] in cuts
    assert list(exported.proto.train.mutated_inputs) == ["batch.input_0"]
    for node in nodes:  # dropout in evaluation returns its own input, which clamp_ then changes
        if node.target == "aten.dropout.default":
            assert position[node.name] not in cuts
            assert position[node.name] + 1 not in cuts


def test_a_residual_network_keeps_most_of_its_cuts() -> None:
    graph = exported_case("residual").proto.train
    assert len(graph.allowed_cuts) >= len(graph.nodes) // 2
    written = [node for node in graph.nodes if node.target == "aten.batch_norm.default"]
    assert all(list(node.mutated_arguments) == [3, 4] for node in written)  # their schema does not say so
    relu = [index for index, node in enumerate(graph.nodes) if node.target == "aten.relu_.default"]
    assert not set(relu).intersection(graph.allowed_cuts)


def test_batch_normalisation_follows_one_process_over_steps_and_micro_batches() -> None:
    case = cases()["residual"]
    exported = export_model(case.model, case.loss, case.batch(4))
    reference = ResidualNet().double()
    reference.load_state_dict(case.model.state_dict())
    chain = Chain(exported, list(exported.proto.train.allowed_cuts)[3:12:4])
    for _ in range(2):
        batch = case.batch(6)
        chain.train(batch, micro_batches=3)
        for rows in torch.tensor_split(torch.arange(6), 3):
            reference(batch[0][rows])
    buffers = {name: tensor for store in chain.stores for name, tensor in store.items() if "norm" in name}
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-12)
    assert int(reference.get_buffer("norm.num_batches_tracked")) == 6


def test_versions_of_buffers_are_immutable_and_assignments_arrive() -> None:
    model = Counting()
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    exported = export_model(model, squared_loss, (x, y))
    assert list(exported.proto.train.mutated_tensors) == ["count"]
    assert [update.tensor for update in exported.proto.train.buffer_updates] == ["mean"]
    store = {name: tensor.detach().clone() for name, tensor in exported.tensors.items()}
    for name in ("first.weight", "first.bias", "second.weight", "second.bias"):
        store[name] = nn.Parameter(store[name])
    built = BuiltSegment(whole_segment(exported), store, CPU, 0)
    versions, passes = [], []
    values = exported.flatten_batch((x, y), pb.GRAPH_KIND_TRAIN).values
    for number in range(3):
        versions.append((store["count"], store["mean"]))
        passes.append(built.forward(values, step=1, micro_batch=number, record=True))
    assert [float(count) for count, _ in versions] == [0.0, 1.0, 2.0]  # nobody wrote into an older version
    assert float(store["count"]) == 3.0
    reference = Counting()
    reference.load_state_dict(model.state_dict())
    losses = [squared_loss(reference(x), y) for _ in range(3)]
    torch.testing.assert_close(store["mean"], reference.mean)
    for made, loss in zip(reversed(passes), reversed(losses), strict=True):
        assert made.loss is not None
        torch.testing.assert_close(made.loss, loss)
        made.backward({}, {}, 1.0)
        loss.backward()
    torch.testing.assert_close(store["first.weight"].grad, reference.first.weight.grad)
    assert not store["mean"].requires_grad


def test_readers_of_an_assigned_buffer_stay_with_its_writer() -> None:
    graph = exported_case("counting").proto.train
    cuts = set(graph.allowed_cuts)
    (update,) = graph.buffer_updates
    reads = [i for i, node in enumerate(graph.nodes) if any(item.value == "tensor.mean" for item in node.arguments)]
    writer = next(i for i, node in enumerate(graph.nodes) if node.name == update.value)
    assert not cuts.intersection(range(min([*reads, writer]) + 1, max([*reads, writer]) + 1))


def test_writes_through_out_arguments_are_seen() -> None:
    class Power(nn.Module):
        """Spectral normalisation's power iteration: `F.normalize(…, out=self.u)` on a buffer."""

        u: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 6)
            self.register_buffer("u", F.normalize(torch.ones(6), dim=0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.linear.weight
            if self.training:
                with torch.no_grad():
                    F.normalize(torch.mv(weight, self.u), dim=0, out=self.u)
            return self.head(x @ (weight / torch.dot(self.u.clone(), torch.mv(weight, self.u))))

    model = Power().double()
    x, y = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    exported = export_model(model, squared_loss, (x, y))
    assert list(exported.proto.train.mutated_tensors) == ["u"]
    expected = eager(model, squared_loss, (x, y), micro_batches=2)
    for cut in exported.proto.train.allowed_cuts:
        assert_equal(Chain(exported, [cut]).train((x, y), micro_batches=2), expected)


def test_parametrised_weights_travel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
        nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.GroupNorm(2, 6),
    ).double()
    x, y = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    exported = export_model(model, squared_loss, (x, y))
    expected = eager(model, squared_loss, (x, y), micro_batches=2)
    for cut in list(exported.proto.train.allowed_cuts)[::3]:
        assert_equal(Chain(exported, [cut]).train((x, y), micro_batches=2), expected)


def test_getitem_follows_its_producer_and_dead_code_is_gone() -> None:
    class Splitting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.linear(x).chunk(2, dim=1)
            torch.cumsum(x, 0)
            unused = torch.zeros(3)
            unused.add_(1)
            values, places = torch.sort(torch.tanh(first) * second, dim=1)
            return values + places

    exported = export_model(Splitting(), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)))
    graph = exported.proto.train
    targets = [node.target for node in graph.nodes]
    assert "aten.cumsum.default" not in targets
    assert "aten.add_.Tensor" not in targets
    chunk = targets.index("aten.chunk.default")
    assert targets[chunk + 1 : chunk + 3] == ["python.getitem"] * 2
    assert graph.nodes[chunk].output.kind == pb.VALUE_KIND_TUPLE
    assert not {chunk + 1, chunk + 2}.intersection(graph.allowed_cuts)
    assert chunk + 3 in graph.allowed_cuts


@pytest.mark.parametrize("rows", [2, 5])
def test_a_batch_that_the_graph_writes_to_is_cloned(rows: int) -> None:
    case = cases()["in_place"]
    exported = export_model(case.model, case.loss, case.batch(3))
    batch = case.batch(rows)
    kept = batch[0].clone()
    chain = Chain(exported, [list(exported.proto.train.allowed_cuts)[-1]])
    assert_equal(chain.train(batch), eager(case.model, case.loss, batch))
    assert torch.equal(batch[0], kept)
