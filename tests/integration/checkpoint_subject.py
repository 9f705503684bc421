"""What the tests of checkpoints train, and how they damage files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gradwire

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Model(nn.Module):
    """Tied weights, a frozen layer, buffers that change and that are not kept, dropout, a parameter nobody reads."""

    def __init__(self, dropout: float = 0.3, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, width)
        self.first = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((width,), 1.5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(torch.tanh(self.norm(self.first(self.embedding(tokens) * self.scale))))
        hidden = hidden + self.frozen(hidden)
        output: torch.Tensor = self.head(hidden + self.dropout(torch.tanh(self.second(hidden))))
        return output


def make_model(seed: int = 0, **changes: Any) -> Model:
    torch.manual_seed(seed)
    return Model(**changes).double()


def make_batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(12, (8,), generator=generator), torch.randint(12, (8,), generator=generator))
        for _ in range(count)
    ]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1]
    others = [parameter for parameter in trained if parameter.dim() == 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.05)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def asgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.ASGD(model.parameters(), lr=0.05)


def make_trainer(
    cluster: gradwire.Cluster,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    stages: int = 2,
    schedule: str = "auto",
    **changes: Any,
) -> gradwire.Trainer:
    """A trainer with AdamW, if no other optimizer is given, that clips gradients."""
    arguments: dict[str, Any] = {"seed": 3, "max_grad_norm": 1.0} | changes
    return cluster.trainer(
        model,
        optimizer or adamw(model),
        loss=F.cross_entropy,
        example=make_batches(1)[0],
        plan=gradwire.Plan(stages=stages, microbatches=2, schedule=schedule),
        **arguments,
    )


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" x")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weights": [1.0] * 100}))
