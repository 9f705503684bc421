"""Small models for the tests of graphs, one for each way in which a graph can be awkward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """A model with its loss and a maker of batches of any number of rows."""

    model: nn.Module
    loss: Any
    batch: Callable[[int], Any]


class Block(nn.Module):
    """Attention and MLP with residuals."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, time, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (part.view(rows, time, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).contiguous().view(rows, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tied embedding and head: one parameter at both ends."""

    def __init__(self, vocabulary: int = 11, width: int = 8, layers: int = 2, context: int = 6) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def squared_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


class ResidualNet(nn.Module):
    """Convolutions with batch normalisation, in-place activations and in-place additions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(images)), inplace=True)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)).add_(x), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Recurrent(nn.Module):
    """LSTM and GRU: operators with several outputs and lists of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True)
        self.gru = nn.GRU(5, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, (hidden, _) = self.lstm(x)
        x, _ = self.gru(x + hidden[-1][:, None])
        return self.head(x[:, -1])


class Dropping(nn.Module):
    """Dropout at several places, with different probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = F.dropout(torch.tanh(layer(x)), 0.1 * number + 0.1, self.training)
        return x


class LongSkip(nn.Module):
    """Values that many later layers read, one of them straight from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.layers[0](x))
        y = first
        for layer in self.layers[1:]:
            y = torch.tanh(layer(y)) * 0.5 + first * x
        return y + first


class Checkpointed(nn.Module):
    """Activation checkpoints around layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = checkpoint(lambda y: torch.tanh(self.second(y)), x, use_reentrant=False)
        return self.third(x)


class Regions(nn.Module):
    """Parts without gradient, with gradient inside of these, and an autocast region."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.autocast = autocast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        with torch.no_grad():
            scale = self.second(x).abs().mean(1, keepdim=True)
            with torch.enable_grad():
                inner = self.second(x) * scale
            shift = inner * 2
        if self.autocast:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = torch.tanh(self.third(x))
                with torch.autocast("cpu", enabled=False):
                    x = self.third(x.float())
        return x / (1 + scale) + inner + shift


class InPlace(nn.Module):
    """In-place operators on activations, views, and a written `out`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mul_(1.5)  # the user's own input
        y = self.first(x)
        y[:, 0] += 1
        half = y[:, :3]
        z = self.second(torch.tanh(y))
        half.mul_(2)
        z = z.add_(y)
        z = F.dropout(z, 0.5, training=False).clamp_(-1, 1)
        return self.third(z)


class Sizes(nn.Module):
    """Numbers that travel: the number of rows is used as a value far behind the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        x = self.first(x).sum(0)
        y = torch.tanh(self.second(x / (rows + 1)))
        z = self.third(y) * (rows * 2 - 1)
        return z.expand(rows, 6) + torch.arange(rows, device=x.device)[:, None] / rows


class Masked(nn.Module):
    """Boolean indexing, top-k, a mask that is not batched, a constant, dict and None outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, scale: float) -> dict[str, Any]:
        x = self.first(x) * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0], dtype=x.dtype)
        x = x.masked_fill(mask, 0.0) * scale
        positive = x[x > 0].sum()
        best = x.topk(2, dim=1).values.sum(1, keepdim=True)
        return {"y": self.second(x) + best + positive / 100, "nothing": None, "count": 3}


class Counting(nn.Module):
    """Buffers: one written in place, one assigned, one that is only read."""

    count: torch.Tensor
    mean: torch.Tensor
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("table", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.second(x) * self.table + self.mean / (1 + self.count)


class Encoder(nn.Module):
    """torch's own transformer layers, with dropout off."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


def _classes(rows: int) -> torch.Tensor:
    return torch.randint(0, 3, (rows,))


def _rows_of_six(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 6, dtype=torch.float64), torch.randn(rows, 6, dtype=torch.float64)


def _dict_loss(output: dict[str, Any], target: torch.Tensor) -> torch.Tensor:
    return squared_loss(output["y"], target)


def _masked_batch(rows: int) -> tuple[Any, ...]:
    from gradwire.graph import unbatched

    x, y = _rows_of_six(rows)
    return x, unbatched(torch.tensor([True, False, False, False, True, False])), 0.5, y


def cases() -> dict[str, Case]:
    """All models that must be exact wherever they are cut, in float64 and seeded."""
    torch.manual_seed(0)
    made = {
        "gpt": Case(GPT(), token_loss, lambda n: (torch.randint(0, 11, (n, 6)), torch.randint(0, 11, (n, 6)))),
        "residual": Case(ResidualNet(), F.cross_entropy, lambda n: (torch.randn(n, 1, 5, 5).double(), _classes(n))),
        "encoder": Case(Encoder(), F.cross_entropy, lambda n: (torch.randn(n, 4, 8).double(), _classes(n))),
        "recurrent": Case(Recurrent(), F.cross_entropy, lambda n: (torch.randn(n, 3, 4).double(), _classes(n))),
        "long_skip": Case(LongSkip(), squared_loss, _rows_of_six),
        "checkpointed": Case(Checkpointed(), squared_loss, _rows_of_six),
        "regions": Case(Regions(autocast=False), squared_loss, _rows_of_six),
        "in_place": Case(InPlace(), squared_loss, _rows_of_six),
        "sizes": Case(Sizes(), squared_loss, _rows_of_six),
        "masked": Case(Masked(), _dict_loss, _masked_batch),
        "counting": Case(Counting(), squared_loss, _rows_of_six),
    }
    return {name: Case(case.model.double(), case.loss, case.batch) for name, case in made.items()}
