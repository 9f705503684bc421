"""Models of torch's own layers: transformers, recurrent and convolutional nets, normalisations, embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from model_zoo import Batch, Generator, Kind, numbers, squared_loss, tokens
from torch import nn
from torch.nn.utils import parametrizations

import gradwire


class Encoder(nn.Module):
    """torch's encoder layers with a causal mask that is not batched, and one of padding that is."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x, mask=mask, src_key_padding_mask=padding)[:, 0])


class Translator(nn.Module):
    """torch's Transformer: memory that every decoder layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=target.dtype)
        return self.head(self.body(source, target, tgt_mask=mask))


class Attention(nn.Module):
    """MultiheadAttention with its weights as a second output, and keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mixed, weights = self.attention(x, memory, memory, key_padding_mask=padding)
        return self.head(mixed), weights


class Recurrent(nn.Module):
    """A recurrent layer of two levels and both directions, its last state and its outputs."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer = layer(4, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, state = self.layer(x)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(outputs.mean(1) + torch.cat([hidden[-2], hidden[-1]], dim=1))


class Cells(nn.Module):
    """A cell called again and again: one module, used at each step of time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


class Residual(nn.Module):
    """A residual block with in-place activations and additions, and a strided shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.first(x)), inplace=True)
        y = self.norm2(self.second(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """The shape of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Residual(4, 4, 1), Residual(4, 6, 2), Residual(6, 6, 1))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class UNet(nn.Module):
    """Skips from each level down to the same level up: values that live over several stages."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 6)))
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(6, 6, 2, 2) for _ in range(2))
        self.merge = nn.ModuleList(nn.Conv2d(a, 6, 3, padding=1) for a in (12, 10))
        self.head = nn.Conv2d(6, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            x = F.silu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.silu(self.middle(x))
        for up, merge in zip(self.up, self.merge, strict=True):
            x = F.silu(merge(torch.cat([up(x), skips.pop()], dim=1)))
        return self.head(x)


class Normalised(nn.Module):
    """Convolutions with this normalisation behind each."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(a, 4, 3, padding=1) for a in (1, 4, 4))
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.gelu(norm(convolution(x)))
        return self.head(x.mean((2, 3)))


class Bags(nn.Module):
    """Embedding bags of equal length, with weights of their elements, and an embedding with a padding index."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(11, 6, mode="mean")
        self.sum = nn.EmbeddingBag(11, 6, mode="sum")
        self.single = nn.Embedding(11, 6, padding_idx=0)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        x = self.mean(ids) + self.sum(ids, per_sample_weights=weights) + self.single(ids).sum(1)
        return self.head(torch.tanh(x))


class Reparametrised(nn.Module):
    """Weights that are computed from other parameters."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.head = wrap(nn.Linear(6, 6)), wrap(nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Convolutions1d(nn.Module):
    """Dilated causal convolutions over time, gated, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4, 8, 3, dilation=2**n) for n in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x + F.glu(layer(F.pad(x, (2 * 2**number, 0))), dim=1)
        return self.head(F.adaptive_max_pool1d(x, 1).squeeze(-1))


def classes(rows: int, generator: Generator) -> torch.Tensor:
    return torch.randint(0, 3, (rows,), generator=generator)


def encoder_batch(rows: int, generator: Generator) -> Batch:
    padding = torch.arange(5) >= torch.randint(1, 6, (rows, 1), generator=generator)
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
    return numbers(rows, 5, 8, generator=generator), gradwire.unbatched(causal), padding, classes(rows, generator)


def translator_batch(rows: int, generator: Generator) -> Batch:
    source, target = numbers(rows, 5, 8, generator=generator), numbers(rows, 4, 8, generator=generator)
    return source, target, numbers(rows, 4, 3, generator=generator)


def attention_batch(rows: int, generator: Generator) -> Batch:
    padding = torch.arange(4) >= torch.randint(1, 5, (rows, 1), generator=generator)
    x, memory = numbers(rows, 5, 8, generator=generator), numbers(rows, 4, 6, generator=generator)
    return x, memory, padding, numbers(rows, 5, 3, generator=generator)


def attention_loss(output: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return squared_loss(output[0], target) + 0.1 * output[1].square().mean()


def sequences(rows: int, generator: Generator) -> Batch:
    return numbers(rows, 4, 4, generator=generator), classes(rows, generator)


def channels(rows: int, generator: Generator) -> Batch:
    return numbers(rows, 4, 9, generator=generator), classes(rows, generator)


def images(rows: int, generator: Generator) -> Batch:
    return numbers(rows, 1, 6, 6, generator=generator), classes(rows, generator)


def pictures(rows: int, generator: Generator) -> Batch:
    return numbers(rows, 1, 8, 8, generator=generator), numbers(rows, 1, 8, 8, generator=generator)


def varying_pictures(rows: int, generator: Generator) -> Batch:
    height, width = (4 * int(size) for size in torch.randint(2, 4, (2,), generator=generator))
    shape = (rows, 1, height, width)
    return numbers(*shape, generator=generator), numbers(*shape, generator=generator)


def vectors(rows: int, generator: Generator) -> Batch:
    return numbers(rows, 6, generator=generator), classes(rows, generator)


def bags(rows: int, generator: Generator) -> Batch:
    return tokens(rows, 4, 11, generator), numbers(rows, 4, generator=generator), classes(rows, generator)


KINDS = (
    Kind(
        name="nn.TransformerEncoder",
        make=Encoder,
        batch=encoder_batch,
        loss=F.cross_entropy,
        shows="a (time, time) mask that is not batched, a mask of padding",
    ),
    Kind(
        name="nn.Transformer", make=Translator, batch=translator_batch, loss=squared_loss, shows="encoder and decoder"
    ),
    Kind(
        name="nn.MultiheadAttention",
        make=Attention,
        batch=attention_batch,
        loss=attention_loss,
        shows="a tuple of outputs, other keys, a mask of padding",
    ),
    Kind(
        name="nn.LSTM", make=lambda: Recurrent(nn.LSTM), batch=sequences, loss=F.cross_entropy, shows="two directions"
    ),
    Kind(name="nn.GRU", make=lambda: Recurrent(nn.GRU), batch=sequences, loss=F.cross_entropy, shows="two directions"),
    Kind(
        name="nn.LSTMCell in a loop",
        make=Cells,
        batch=sequences,
        loss=F.cross_entropy,
        shows="one module at each step of time",
    ),
    Kind(
        name="ResNet with BatchNorm",
        make=ResNet,
        batch=images,
        loss=F.cross_entropy,
        rows_depend=True,
        shows="running statistics in micro-batch order, in-place operators",
    ),
    Kind(name="U-Net", make=UNet, batch=pictures, loss=squared_loss, shows="skips over more than one stage"),
    Kind(
        name="U-Net, heights and widths that differ",
        make=UNet,
        batch=varying_pictures,
        loss=squared_loss,
        dynamic=({2: "height", 3: "width"}, {2: "height", 3: "width"}),
        shows="multiples of 4, found by the export",
    ),
    Kind(
        name="GroupNorm",
        make=lambda: Normalised(lambda: nn.GroupNorm(2, 4)),
        batch=images,
        loss=F.cross_entropy,
        shows="statistics within a row",
    ),
    Kind(
        name="InstanceNorm with running statistics",
        make=lambda: Normalised(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        batch=images,
        loss=F.cross_entropy,
        rows_depend=True,
        shows="buffers that change",
    ),
    Kind(
        name="Dilated causal convolutions",
        make=Convolutions1d,
        batch=channels,
        loss=F.cross_entropy,
        shows="padding, gates, pooling over time",
    ),
    Kind(
        name="nn.EmbeddingBag",
        make=Bags,
        batch=bags,
        loss=F.cross_entropy,
        shows="weights of elements, a padding index",
    ),
    Kind(
        name="Weight normalisation",
        make=lambda: Reparametrised(parametrizations.weight_norm),
        batch=vectors,
        loss=F.cross_entropy,
        shows="weights made from parameters",
    ),
    Kind(
        name="Spectral normalisation",
        make=lambda: Reparametrised(parametrizations.spectral_norm),
        batch=vectors,
        loss=F.cross_entropy,
        rows_depend=True,
        shows="power iteration in buffers",
    ),
)
