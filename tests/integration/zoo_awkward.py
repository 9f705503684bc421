"""Models that are awkward in one way each: shared and frozen parts, several outputs, routing, numbers that travel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from model_zoo import Batch, Generator, Kind, masked_labels, numbers, squared_loss, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint


class Stack(nn.Module):
    """Linear layers of width 6."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))


class Twice(Stack):
    """Each module is called twice, and the last layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__(3)
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.layers):
            x = torch.tanh(layer(x))
        return x


class Frozen(Stack):
    """The first layers are frozen; one has a frozen bias only; one takes no part."""

    def __init__(self) -> None:
        super().__init__(5)
        self.layers[0].requires_grad_(False)
        self.layers[1].bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:4]:
            x = torch.tanh(layer(x))
        return x


class LongSkip(Stack):
    """The first layer's output and the input itself are read by every layer behind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = y = torch.tanh(self.layers[0](x))
        for layer in self.layers[1:]:
            y = torch.tanh(layer(y)) + first * x
        return y * first


class Named(Stack):
    """Inputs by name, of several types, with a number, a flag and None; a dict of outputs."""

    def forward(
        self, x: torch.Tensor, keep: torch.Tensor, position: torch.Tensor, scale: float, flag: bool, more: Any = None
    ) -> dict[str, Any]:
        hidden = torch.tanh(self.layers[0](x)) * scale
        hidden = torch.where(keep, self.layers[1](hidden), hidden)
        if flag:
            hidden = hidden + F.one_hot(position, 6)
        return {"hidden": hidden, "parts": (self.layers[2](hidden), self.layers[3](hidden)), "more": more}


class Classifier(Stack):
    """Scores of tokens, for losses that weigh them."""

    def __init__(self) -> None:
        super().__init__(2)
        self.embedding = nn.Embedding(11, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.linear(x, self.embedding.weight)


class Selecting(Stack):
    """Boolean indexing: the number of elements depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        y = self.layers[1](x)
        y = y.masked_fill(y < -1, 0.0)
        y[y > 0.5] *= 0.5
        picked = self.layers[2](x[x[:, 0] > 0]).sum(0)
        return self.layers[3](y) + picked / 10


class Experts(Stack):
    """A mixture of experts: each row goes through its two best ones, of which it takes the weighted sum."""

    def __init__(self) -> None:
        super().__init__(4)
        self.router = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(x)
        for number, layer in enumerate(self.layers):
            row, place = torch.where(chosen == number)
            result.index_add_(0, row, layer(x[row]) * weights[row, place, None])
        return result + x


class Numbers(Stack):
    """Sizes are used as numbers far behind where they were taken: they travel between stages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, width = x.shape
        total = torch.tanh(self.layers[0](x)).sum(0)
        y = torch.tanh(self.layers[1](total / (rows + 1))) * (rows * 2 - 1)
        z = self.layers[2](y).expand(rows, width) + torch.arange(rows)[:, None] / rows
        return self.layers[3](z.reshape(rows * width).view(rows, width))


class Buffers(Stack):
    """Buffers: one counts in place, one is assigned anew, one is not in the state dict."""

    steps: torch.Tensor
    mean: torch.Tensor
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("table", torch.linspace(0.5, 1.0, 6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.table
        if self.training:
            self.steps += 1
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return x - self.mean


class Regions(Stack):
    """Parts without gradient, and an activation checkpoint."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        with torch.no_grad():
            scale = self.layers[1](x).abs().mean(1, keepdim=True)
        x = checkpoint(lambda y: torch.tanh(self.layers[2](y)), x, use_reentrant=False)
        return self.layers[3](x) / (1 + scale)


class InPlace(Stack):
    """In-place operators on the input, on activations and on views of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x.mul_(1.5))
        x[:, 0] += 1
        half = x[:, :3]
        y = self.layers[1](torch.tanh(x))
        half.mul_(2)
        y = y.add_(x).clamp_(-2, 2)
        return self.layers[2](y)


class Complex(Stack):
    """A spectrum, filtered: complex numbers between operators."""

    def __init__(self) -> None:
        super().__init__(2)
        self.filter = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(torch.tanh(self.layers[0](x))) * torch.view_as_complex(self.filter)
        return self.layers[1](torch.fft.irfft(spectrum, n=6))


def vectors(rows: int, generator: Generator) -> Batch:
    return numbers(rows, 6, generator=generator), numbers(rows, 6, generator=generator)


def named_batch(rows: int, generator: Generator) -> Batch:
    return {
        "x": numbers(rows, 6, generator=generator),
        "keep": torch.rand((rows, 6), generator=generator) > 0.5,
        "position": torch.randint(0, 6, (rows,), generator=generator),
        "scale": 0.5,
        "flag": True,
        "more": None,
        "target": numbers(rows, 6, generator=generator),
    }


def named_loss(output: dict[str, Any], target: torch.Tensor) -> torch.Tensor:
    first, second = output["parts"]
    return squared_loss(first, target) + 0.3 * squared_loss(second, target) + 0.01 * output["hidden"].square().mean()


def token_batch(rows: int, generator: Generator) -> Batch:
    return tokens(rows, 5, 11, generator), masked_labels(rows, 5, 11, generator)


def sum_and_weight(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over the tokens that count, and how many they are."""
    counted = labels >= 0
    each = F.cross_entropy(scores.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none")
    return (each * counted.flatten()).sum(), counted.sum()


def masked_mean(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.transpose(1, 2), labels)


def smoothed_mean(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def distances(rows: int, generator: Generator) -> Batch:
    return (numbers(rows, 6, generator=generator), torch.randint(0, 2, (rows,), generator=generator).double())


def contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss of several terms over pairs of a row's parts."""
    left, right = F.normalize(output[:, :3], dim=1), F.normalize(output[:, 3:], dim=1)
    near = F.cosine_embedding_loss(left, right, target * 2 - 1, margin=0.2)
    return near + F.binary_cross_entropy_with_logits(output[:, 0], target) + 0.1 * F.smooth_l1_loss(left, right)


KINDS = (
    Kind(name="Modules used twice", make=Twice, batch=vectors, loss=squared_loss, shows="tied first and last weights"),
    Kind(name="Frozen parts", make=Frozen, batch=vectors, loss=squared_loss, shows="parameters that get no gradient"),
    Kind(name="Long skips", make=LongSkip, batch=vectors, loss=squared_loss, shows="values that every stage reads"),
    Kind(
        name="Named inputs, nested outputs",
        make=Named,
        batch=named_batch,
        loss=named_loss,
        shows="a dict of tensors, a number, a flag and None; a dict with a tuple as output",
    ),
    Kind(
        name="(sum, weight) loss",
        make=Classifier,
        batch=token_batch,
        loss=sum_and_weight,
        shows="token-weighted mean of the whole batch",
    ),
    Kind(
        name="Masked labels",
        make=Classifier,
        batch=token_batch,
        loss=masked_mean,
        shows="cross entropy with ignore_index is the whole batch's mean",
    ),
    Kind(
        name="Label smoothing",
        make=Classifier,
        batch=token_batch,
        loss=smoothed_mean,
        shows="the same with smoothed labels",
    ),
    Kind(
        name="Several losses",
        make=lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)),
        batch=distances,
        loss=contrastive,
        shows="a sum of three losses",
    ),
    Kind(
        name="Boolean indexing",
        make=Selecting,
        batch=vectors,
        loss=squared_loss,
        rows_depend=True,
        shows="sizes that depend on the data",
    ),
    Kind(name="Top-k routing", make=Experts, batch=vectors, loss=squared_loss, shows="a mixture of experts"),
    Kind(
        name="Sizes as numbers",
        make=Numbers,
        batch=vectors,
        loss=squared_loss,
        rows_depend=True,
        shows="whole numbers that travel between stages",
    ),
    Kind(
        name="Buffers that change",
        make=Buffers,
        batch=vectors,
        loss=squared_loss,
        rows_depend=True,
        shows="counted in place, assigned, not persistent",
    ),
    Kind(name="Regions", make=Regions, batch=vectors, loss=squared_loss, shows="no_grad, activation checkpoint"),
    Kind(name="In-place operators", make=InPlace, batch=vectors, loss=squared_loss, shows="on inputs and views"),
    Kind(name="Spectra", make=Complex, batch=vectors, loss=squared_loss, shows="complex numbers"),
)
