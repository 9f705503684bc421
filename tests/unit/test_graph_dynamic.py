"""Dimensions besides the rows that differ from batch to batch: names, bounds, multiples, checks, exactness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_driver import Chain, assert_equal, eager
from graph_models import GPT, squared_loss, token_loss
from torch import nn
from torch.export import Dim

from gradwire.graph import export_model
from gradwire_protocol.errors import BatchError, ModelError
from gradwire_protocol.v1 import graph_pb2 as pb

LENGTH = ({1: "length"}, {1: "length"})


class Masked(nn.Module):
    """Attention under a slice of a mask of 8 by 8; at one length something else, if asked to."""

    mask: torch.Tensor

    def __init__(self, special: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.special = special
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, length = self.embedding(tokens), tokens.shape[1]
        if length == self.special:
            x = x * 2
        scores = (x @ x.transpose(1, 2)).masked_fill(~self.mask[:length, :length], 0.0)
        return (scores @ x) @ self.embedding.weight.T


class Pooling(nn.Module):
    """Halves and doubles again: sizes must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halved = nn.functional.avg_pool1d(self.layer(x), 2)
        return x + halved.repeat_interleave(2, dim=2)


def tokens(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 11, (rows, length)), torch.randint(0, 11, (rows, length))


def test_lengths_are_exact_up_to_the_longest_position() -> None:
    model = GPT(layers=1, context=6).double()
    exported = export_model(model, token_loss, tokens(2, 4), dynamic=LENGTH)
    for length in (1, 2, 5, 6):
        batch = tokens(3, length)
        chain = Chain(exported, list(exported.proto.train.allowed_cuts)[5:7])
        assert_equal(chain.train(batch, micro_batches=2), eager(model, token_loss, batch, micro_batches=2))
        torch.testing.assert_close(chain.predict(batch[:1]), model(batch[0]), rtol=1e-12, atol=1e-12)


def test_the_graph_is_described_at_the_examples_size() -> None:
    model = GPT(layers=1).double()
    fixed = export_model(model, token_loss, tokens(2, 4)).proto.train
    varying = export_model(model, token_loss, tokens(2, 4), dynamic=LENGTH).proto.train
    specs = {node.name: (node.output, node.flops, node.bytes) for node in fixed.nodes}
    same = [node.name for node in varying.nodes if node.name in specs and node.target.startswith("aten.linear")]
    assert same
    for node in varying.nodes:
        if node.name in same:
            assert (node.output, node.flops, node.bytes) == specs[node.name]


def test_bounds_come_from_the_model_and_the_full_length_is_allowed() -> None:
    model = Masked().double()
    exported = export_model(model, token_loss, tokens(3, 5), dynamic=LENGTH)
    for length in (1, 7, 8):
        batch = tokens(4, length)
        assert_equal(Chain(exported, [3]).train(batch), eager(model, token_loss, batch))
    with pytest.raises(BatchError, match=r"input 0 has a size in dimension 1.*length: 1 to 8\. Got: 9"):
        exported.flatten_batch(tokens(4, 9), pb.GRAPH_KIND_TRAIN)


def test_a_length_at_which_the_model_does_something_else_is_excluded() -> None:
    exported = export_model(Masked(special=8), token_loss, tokens(3, 5), dynamic=LENGTH)
    exported.flatten_batch(tokens(2, 7), pb.GRAPH_KIND_TRAIN)
    with pytest.raises(BatchError, match="1 to 8, not 8"):
        exported.flatten_batch(tokens(2, 8), pb.GRAPH_KIND_TRAIN)
    # A copy that is not compared with the model has the excluded size, right or not.
    unchecked = export_model(Masked(), token_loss, tokens(3, 5), dynamic=LENGTH, check=False)
    with pytest.raises(BatchError, match="not 8"):
        unchecked.flatten_batch(tokens(2, 8), pb.GRAPH_KIND_TRAIN)
    with pytest.raises(ModelError, match=r"differs from the model's own, on 1 row\(s\), length 1"):
        export_model(Masked(special=1), token_loss, tokens(3, 5), dynamic=LENGTH)


def test_multiples_come_from_the_model() -> None:
    model = Pooling().double()
    example = (torch.randn(2, 1, 8).double(), torch.randn(2, 1, 8).double())
    exported = export_model(model, squared_loss, example, dynamic=({2: "width"}, {2: "width"}))
    batch = (torch.randn(3, 1, 12).double(), torch.randn(3, 1, 12).double())
    assert_equal(Chain(exported, [1]).train(batch, micro_batches=2), eager(model, squared_loss, batch, micro_batches=2))
    with pytest.raises(BatchError, match=r"a multiple of 2\. Got: 7"):
        exported.flatten_batch((torch.randn(3, 1, 7).double(),) * 2, pb.GRAPH_KIND_TRAIN)


def test_sizes_that_do_not_fit_together_name_both_inputs() -> None:
    exported = export_model(GPT(layers=1), token_loss, tokens(2, 4), dynamic=LENGTH)
    with pytest.raises(BatchError) as caught:
        exported.flatten_batch((tokens(2, 4)[0], tokens(2, 5)[1]), pb.GRAPH_KIND_TRAIN)
    assert "input 0, dimension 1 ('length'): 4; target, dimension 1 ('length'): 5" in str(caught.value)
    # Names that the user keeps apart, but the model ties to each other.
    x = torch.randn(2, 6, 3)
    apart = export_model(nn.Linear(3, 3), squared_loss, (x, x), dynamic=({1: "read"}, {1: "written"}))
    apart.flatten_batch((x[:, :4], x[:, :4]), pb.GRAPH_KIND_TRAIN)
    with pytest.raises(BatchError, match=r"do not fit together.*ties them to each other"):
        apart.flatten_batch((x[:, :4], x[:, :5]), pb.GRAPH_KIND_TRAIN)
    # Other dimensions stay as in the example.
    with pytest.raises(BatchError, match=r"Expected: \(rows, length\)\. Got: \(2, 4, 1\)"):
        exported.flatten_batch((torch.zeros(2, 4, 1, dtype=torch.int64), tokens(2, 4)[1]), pb.GRAPH_KIND_TRAIN)


def test_dict_examples_and_bounds_of_the_users_own() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * mask

    batch = {"x": torch.randn(2, 4, 3), "mask": torch.ones(2, 4, 1), "labels": torch.randn(2, 4, 3)}
    length = Dim("length", min=2, max=6)
    exported = export_model(
        Named(), squared_loss, batch, dynamic={"x": {1: length}, "mask": {1: length}, "labels": {1: length}}
    )
    small = {name: tensor[:, :2] for name, tensor in batch.items()}
    assert exported.flatten_batch(small, pb.GRAPH_KIND_TRAIN).rows == 2
    with pytest.raises(BatchError, match=r"length: 2 to 6\. Got: 1"):
        exported.flatten_batch({name: tensor[:, :1] for name, tensor in batch.items()}, pb.GRAPH_KIND_TRAIN)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        (({1: "length"},), r"does not fit the example.*Got: 1 entries"),
        ({"x": {1: "length"}}, "dynamic is not understood"),
        (("length", None), "dynamic is not understood"),
        (({"1": "length"}, None), "dynamic is not understood"),
        (({0: "length"}, None), "dimension 0 is the batch"),
        (({2: "length"}, None), "Dimension 2 of input 0 cannot be dynamic"),
        (({1: 3}, None), "name of a dynamic dimension is not valid"),
        (({1: "rows"}, None), "name of a dynamic dimension is not valid"),
        (({1: Dim("a", min=2)}, {1: Dim("a", min=3)}), "dynamic is not understood"),
        (({1: "length"}, None), "works for some sizes of 'length' only, at module 'layer', test_graph_dynamic"),
    ],
)
def test_names_that_cannot_be(dynamic: Any, message: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with pytest.raises(ModelError, match=message):
        export_model(Layer(), squared_loss, (torch.randn(3, 6), torch.randn(3, 6)), dynamic=dynamic)


def test_examples_of_size_one_and_of_different_sizes() -> None:
    with pytest.raises(ModelError, match="has size 1 in dimension 1 of input 0"):
        export_model(GPT(layers=1), token_loss, tokens(2, 1), dynamic=LENGTH)
    with pytest.raises(ModelError, match="dimensions named 'length' have different sizes"):
        export_model(GPT(layers=1), token_loss, (tokens(2, 4)[0], tokens(2, 5)[1]), dynamic=LENGTH)
    with pytest.raises(ModelError, match="does not fit the example"):
        export_model(
            nn.Linear(6, 6),
            squared_loss,
            {"input": torch.randn(2, 6), "target": torch.randn(2, 6)},
            dynamic={"y": {1: "a"}},
        )


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_time_steps_of_recurrent_layers_are_built_in(layer: type[nn.Module]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(3, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[0]

    x = torch.randn(2, 4, 3)
    with pytest.raises(ModelError, match=r"works for some sizes of 'length' only, at module 'layer'.*pad batches"):
        export_model(Recurrent(), squared_loss, (x, x), dynamic=LENGTH)
