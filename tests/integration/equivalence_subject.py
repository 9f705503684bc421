"""Two models, two optimizers and four batches, trained by plain torch in one process and by a cluster, and compared.

The reference is written out here in plain torch, apart from the product's own `verify`.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradwire
from gradwire.graph import export_model
from gradwire.job.gpt import GPT, Shape, next_byte_loss

TOLERANCE = 1e-10
# The third does not divide into 2 or 8 micro-batches, the last has fewer rows than 8.
BATCH_ROWS = (16, 16, 13, 5)


def make_gpt() -> nn.Module:
    """Tied embedding and head; a loss that is a sum over a weight once exported."""
    return GPT(Shape(layers=2, width=16, heads=2, context=8))


def gpt_batch(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, 256, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def make_regression() -> nn.Module:
    """No tied weights; a loss that is a mean over rows; a skip over the whole model."""

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = x
            for layer in self.layers:
                hidden = hidden + torch.tanh(layer(hidden))
            return self.head(hidden * x)

    return Regression()


def regression_batch(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 3, generator=generator, dtype=torch.float64)


KINDS = {
    "gpt": (make_gpt, gpt_batch, next_byte_loss),
    "regression": (make_regression, regression_batch, F.mse_loss),
}


def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups with settings of their own."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 3e-3, "betas": (0.8, 0.9)}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)


def make_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)


OPTIMIZERS = {"adamw": make_adamw, "sgd": make_sgd}


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return KINDS[kind][0]().double()


@functools.cache
def kept_model(kind: str) -> nn.Module:
    """One and the same, for its export to be kept; its weights are as `make_model` has them."""
    return make_model(kind)


def batches(kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [KINDS[kind][1](rows, seed) for seed, rows in enumerate(BATCH_ROWS)]


@functools.cache
def one_process(
    kind: str, optimizer_name: str, micro_batches: int, max_grad_norm: float | None
) -> tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return losses and gradients of each step, and the final weights."""
    model = make_model(kind)
    optimizer = OPTIMIZERS[optimizer_name](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    loss = KINDS[kind][2]
    losses, gradients = [], []
    for x, y in batches(kind):
        optimizer.zero_grad()
        total = 0.0
        for part_x, part_y in zip(x.tensor_split(micro_batches), y.tensor_split(micro_batches), strict=True):
            if len(part_x):
                value = loss(model(part_x), part_y) * (len(part_x) / len(x))
                value.backward()
                total += value.item()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        losses.append(total)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
        scheduler.step()
    return losses, gradients, model.state_dict()


def on_cluster(
    cluster: gradwire.Cluster, kind: str, optimizer_name: str, plan: gradwire.Plan, max_grad_norm: float | None
) -> tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    model = kept_model(kind)
    optimizer = OPTIMIZERS[optimizer_name](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    data = batches(kind)
    losses, gradients = [], []
    with cluster.trainer(
        model, optimizer, loss=KINDS[kind][2], example=data[0], plan=plan, max_grad_norm=max_grad_norm
    ) as trainer:
        for x, y in data:
            result, made = trainer.step_with_gradients(x, y)
            scheduler.step()
            losses.append(result.loss)
            gradients.append(made)
        return losses, gradients, trainer.state_dict()


def check_equal(made: Any, reference: Any) -> None:
    assert made[0] == pytest.approx(reference[0], rel=TOLERANCE, abs=0)
    for step, (ours, theirs) in enumerate(zip(made[1], reference[1], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            scale = gradient.abs().max().item()
            assert (ours[name] - gradient).abs().max().item() <= TOLERANCE * scale + 1e-17, f"step {step}: {name}"
    assert made[2].keys() == reference[2].keys()
    for name, weight in reference[2].items():
        assert (made[2][name] - weight).abs().max().item() <= TOLERANCE * weight.abs().max().item(), name


@functools.cache
def allowed_cuts(kind: str) -> tuple[int, ...]:
    exported = export_model(make_model(kind), KINDS[kind][2], batches(kind)[0], check=False)
    return tuple(exported.proto.train.allowed_cuts)


def random_cuts(kind: str, stages: int, seed: int) -> tuple[int, ...] | None:
    return tuple(sorted(random.Random(seed).sample(allowed_cuts(kind), stages - 1))) or None
