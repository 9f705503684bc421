"""The model, batches and trainers that tests of what replicas agree on share; and one process beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradwire

ROWS = 12


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 17, bias=False), nn.Tanh(), nn.Linear(17, 3)
    ).double()


def make_tied_model() -> nn.Module:
    model = make_model()
    assert isinstance(model, nn.Sequential)
    again = nn.Linear(17, 17, bias=False).double()
    again.weight = model[2].weight
    return nn.Sequential(*model[:4], again, nn.Tanh(), model[4])


def make_batch(seed: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    return x, torch.stack([x.sum(1), x.prod(1), x.amax(1)], dim=1)


def make_optimizer(model: nn.Module, name: str = "AdamW") -> torch.optim.Optimizer:
    kind: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    return kind(model.parameters(), lr=1e-2)


def train(
    cluster: gradwire.Cluster, optimizer: str = "AdamW", *, model: nn.Module | None = None, **fields: Any
) -> gradwire.Trainer:
    fields = {"stages": 2, "replicas": 2, "microbatches": 4, "schedule": "1f1b", "cuts": ["2"], **fields}
    model = model or make_model()
    return cluster.trainer(
        model,
        make_optimizer(model, optimizer),
        loss=F.mse_loss,
        example=make_batch(0),
        plan=gradwire.Plan(**fields),
        max_grad_norm=0.5,
    )


def one_process(steps: int, optimizer: str = "AdamW", first: int = 0, model: nn.Module | None = None) -> nn.Module:
    model = model or make_model()
    update = make_optimizer(model, optimizer)
    for seed in range(first, first + steps):
        update.zero_grad()
        x, y = make_batch(seed)
        F.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        update.step()
    return model


def check_first_step(trainer: gradwire.Trainer) -> None:
    """Gradients as the optimizer saw them, and the norm before they were clipped."""
    result, gradients = trainer.step_with_gradients(*make_batch(0))
    reference = make_model()
    F.mse_loss(reference(make_batch(0)[0]), make_batch(0)[1]).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5).item()
    assert result.gradient_norm == pytest.approx(norm, rel=1e-10)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(gradients[name], parameter.grad, rtol=0, atol=1e-10), name


def check_weights(made: dict[str, torch.Tensor], model: nn.Module) -> None:
    for name, weight in model.state_dict().items():
        assert (made[name] - weight).abs().max().item() <= 1e-10, name


def check_replicas_are_one(trainer: gradwire.Trainer) -> None:
    """Each row twice, in micro-batches of a row, which replicas take in turns: a difference in weights would show."""
    x, _ = make_batch(99, trainer.plan.micro_batches // 2)
    made = trainer.predict(x.repeat_interleave(2, dim=0))
    assert torch.equal(made[0::2], made[1::2])
