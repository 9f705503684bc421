"""A byte-level GPT in nanoGPT's shape (Karpathy, github.com/karpathy/nanoGPT): the main job's model, and its sampling.

Pre-norm blocks of causal attention and a GELU MLP, learned positions, the embedding's weight also as the head's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # torch's own convention
from torch import nn

from gradwire_protocol.errors import SettingsError

VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model's sizes; SettingsError if they do not go together."""

    layers: int
    width: int
    heads: int
    context: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise SettingsError(
                "The width cannot be divided among the heads",
                expected=f"a width that is a multiple of heads ({self.heads})",
                got=str(self.width),
                remedy="change --width or --heads",
            )


class Attention(nn.Module):
    """Causal self-attention, all heads at once."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.projection = nn.Linear(shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, context, width = x.shape
        query, key, value = (
            part.view(batch, context, self.heads, width // self.heads).transpose(1, 2)  # (batch, head, context, size)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: torch.Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, context, width))
        return result


class Block(nn.Module):
    """One layer: attention and MLP, each with its norm before it and its residual around it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        result: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class GPT(nn.Module):
    """Bytes to the logits of the bytes that follow: (batch, context) of int64 to (batch, context, 256)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Each layer adds twice to the residual stream: keep its variance independent of the depth (GPT-2).
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.projection.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.shape.layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.positions(positions)  # (batch, context, width)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def next_byte_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy in nats a byte. logits: (batch, context, 256); target: (batch, context)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return nanoGPT's AdamW: matrices decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


@torch.no_grad()
def continue_text(model: GPT, prompt: bytes, length: int, *, temperature: float, seed: int) -> bytes:
    """Return `length` bytes that continue the prompt; temperature 0 takes the likeliest byte each time."""
    if not prompt:
        raise SettingsError("The prompt is empty", expected="one byte or more", got="none")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(list(prompt), dtype=torch.int64)
    model.eval()
    for _ in range(length):
        logits = model(tokens[None, -model.shape.context :])[0, -1]
        if temperature > 0:
            following = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        else:
            following = logits.argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, following])
    return bytes(tokens[len(prompt) :].tolist())
