"""The user's own module in eager mode draws what segments of its graph draw, whatever it draws with (in float64)."""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_driver import Chain
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradwire_stage.randomness
from gradwire.graph import ExportedModel, export_model
from gradwire.reference import reference_step
from gradwire_protocol.errors import ModelError
from gradwire_protocol.randomness import draw_seed

WIDTH = 8
ROWS = 5
transformers_only = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers comes with the extra 'examples'"
)


class Everything(nn.Module):
    """Dropout of every kind, in place and not, noise, sampling, and numbers that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.droppings = nn.ModuleList(
            [nn.Dropout(0.2), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), nn.Dropout(0.3, inplace=True)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        F.dropout(x, 0.5)  # eager mode draws for it, the graph does not
        torch.rand(7)
        for layer, dropping in zip(self.layers, self.droppings, strict=False):
            x = x + torch.tanh(dropping(layer(x)))
        images = x.reshape(x.shape[0], -1, 2, 2)
        x = x + F.dropout2d(images, 0.4).reshape(x.shape) + F.dropout(x, 0.0) + F.dropout(x, 0.5, False)
        with torch.no_grad():
            x = x + torch.randn_like(x) * torch.bernoulli(torch.full_like(x, 0.4))
        chosen = torch.multinomial(torch.softmax(x[:, 0], -1), 3)
        x = (
            F.rrelu(x, training=True) * F.gumbel_softmax(x, dim=-1)
            + x.gather(-1, chosen[:, None].expand(-1, 2, -1)).sum()
        )
        query = self.layers[4](x)
        return x + F.scaled_dot_product_attention(query, query, x, dropout_p=0.2) * torch.rand(WIDTH, dtype=x.dtype)


class Recurrent(nn.Module):
    """Draws between layers, several times for one node."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 3, dropout=0.3, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, 2, dropout=0.3, batch_first=True)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.gru(self.dropout(self.lstm(x)[0]))[0])


class Checkpointed(nn.Module):
    """Regions that autograd computes again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.lstm = nn.LSTM(WIDTH, WIDTH, 3, dropout=0.3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.dropout(x, 0.1)
            x = x + checkpoint(self.block, layer, x, use_reentrant=False)
        return F.dropout(checkpoint(lambda y: self.lstm(y)[0], x, use_reentrant=False), 0.1)

    def block(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.tanh(layer(F.dropout(x, 0.3))) * torch.rand_like(x), 0.3)


class Attention(nn.Module):
    """torch's transformer with its default dropout, and attention that also gives its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(WIDTH, 2, 1, 1, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x, x)
        attended, weights = self.attention(x, x, x)
        return attended + weights.sum()


class PartlyFrozen(nn.Module):
    """A part that the user keeps in evaluation mode draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
        self.first.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def noisy_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output + torch.randn_like(output), F.dropout(target, 0.1))


def gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(vocab_size=20, n_positions=6, n_embd=WIDTH, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertForMaskedLM(config)


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, 2, WIDTH, dtype=torch.float64), torch.randn(ROWS, 2, WIDTH, dtype=torch.float64)


def words() -> dict[str, torch.Tensor]:
    tokens = torch.randint(20, (ROWS, 6))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], Any]]] = {
    "everything": (Everything, F.mse_loss, numbers),
    "a loss that draws": (PartlyFrozen, noisy_loss, numbers),
    "recurrent": (Recurrent, F.mse_loss, numbers),
    "checkpoints": (Checkpointed, F.mse_loss, numbers),
    "attention": (Attention, F.mse_loss, numbers),
}
HUGGING_FACE = {"gpt2": gpt2, "bert": bert}


def export(
    make: Callable[[], nn.Module], loss: Any, make_batch: Callable[[], Any]
) -> tuple[nn.Module, ExportedModel, Any]:
    torch.manual_seed(0)
    model = make().double()
    batch = make_batch()
    return model, export_model(model, loss, batch), batch


def reference(model: nn.Module, exported: ExportedModel, loss: Any, batch: Any, **settings: Any) -> Any:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return reference_step(
        model, optimizer, loss, exported, batch, micro_batches=2, max_grad_norm=None, seed=7, **settings
    )


def largest_difference(made: tuple[float, dict[str, torch.Tensor]], chain: Chain, batch: Any) -> float:
    loss, gradients = made
    outcome = chain.train(batch, micro_batches=2)
    assert outcome.gradients.keys() == gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    off = [(outcome.gradients[name] - gradient).abs().max().item() for name, gradient in gradients.items()]
    return max(abs(outcome.loss - loss), max(off) / scale)


def check(make: Callable[[], nn.Module], loss: Any, make_batch: Callable[[], Any]) -> None:
    model, exported, batch = export(make, loss, make_batch)
    before = torch.get_rng_state()
    made = reference(model, exported, loss, batch)
    assert torch.equal(torch.get_rng_state(), before)
    allowed = list(exported.proto.train.allowed_cuts)
    for cuts in ([], [allowed[len(allowed) // 2]], sorted(random.Random(3).sample(allowed, 3))):
        assert largest_difference(made, Chain(exported, cuts, seed=7), batch) < 1e-12
    assert largest_difference(made, Chain(exported, cuts, seed=7, recompute=True), batch) < 1e-12
    assert largest_difference(made, Chain(exported, [], seed=8), batch) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_one_process_draws_what_segments_draw(name: str) -> None:
    check(*CASES[name])


@transformers_only
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_with_their_own_dropout(name: str) -> None:
    check(HUGGING_FACE[name], None, words)


def test_another_seeding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the same numbers in each micro-batch."""
    model, exported, batch = export(*CASES["checkpoints"])
    made = reference(model, exported, F.mse_loss, batch)
    monkeypatch.setattr(
        gradwire_stage.randomness,
        "draw_seed",
        lambda seed, step, micro_batch, node: draw_seed(seed, step, 0, node),
    )
    assert largest_difference(made, Chain(exported, [], seed=7), batch) > 1e-3


def test_under_autocast() -> None:
    torch.manual_seed(0)
    batch = tuple(item.float() for item in numbers())
    model, loss = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH)), F.mse_loss
    exported = export_model(model, loss, batch, precision=torch.bfloat16)
    made = reference(model, exported, loss, batch, precision=torch.bfloat16)
    cut = exported.proto.train.allowed_cuts[1]
    assert largest_difference(made, Chain(exported, [cut], seed=7, precision=torch.bfloat16), batch) < 1e-6


class Sometimes(nn.Module):
    """Does in eager mode what the graph that was made of it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.what = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.what == "none":
            return x
        if self.what == "other":
            return x * torch.rand_like(x)
        if self.what == "unseen":
            torch.default_generator.manual_seed(3)
        if self.what == "more":
            x = F.dropout(x, 0.1)
        return F.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none", r"draw 1 of 1 of a micro-batch: aten.dropout.default, at test_draws.py.*Got: nothing more"),
        ("other", r"aten.dropout.default, at test_draws.py.*Got: aten.rand_like"),
        ("more", r"no more than 1 draw\(s\) in a micro-batch. Got: aten.bernoulli_"),
        ("unseen", "seeds the generator"),
    ],
)
def test_what_differs_is_told(what: str, message: str) -> None:
    model, exported, batch = export(Sometimes, F.mse_loss, numbers)
    model.what = what
    before = torch.get_rng_state()
    with pytest.raises(ModelError, match=message):
        reference(model, exported, F.mse_loss, batch)
    assert torch.equal(torch.get_rng_state(), before)
