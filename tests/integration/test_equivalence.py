"""Training on a cluster equals one process: losses, every gradient, every updated weight, in float64 within 1e-10.

The reference is written out here in plain torch, apart from the product's own `verify`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
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


def batches(kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [KINDS[kind][1](rows, seed) for seed, rows in enumerate(BATCH_ROWS)]


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
    model = make_model(kind)
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


def random_cuts(kind: str, stages: int, seed: int) -> tuple[int, ...] | None:
    allowed = list(
        export_model(make_model(kind), KINDS[kind][2], batches(kind)[0], check=False).proto.train.allowed_cuts
    )
    return tuple(sorted(random.Random(seed).sample(allowed, stages - 1))) or None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    with cluster_in_process(tmp_path_factory.mktemp("cluster"), stage_servers=4) as made:
        yield made


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_schedule_and_number_of_micro_batches(
    cluster: gradwire.Cluster, kind: str, stages: int, schedule: str, micro_batches: int
) -> None:
    """Every other case takes the other optimizer, and every third clips the gradient's norm."""
    case = (stages * 2 + (schedule == "gpipe")) * 3 + micro_batches // 3
    optimizer = sorted(OPTIMIZERS)[case % 2]
    max_grad_norm = 0.05 if case % 3 == 0 else None
    plan = gradwire.Plan(
        stages=stages, microbatches=micro_batches, schedule=schedule, cuts=random_cuts(kind, stages, seed=case)
    )
    made = on_cluster(cluster, kind, optimizer, plan, max_grad_norm)
    check_equal(made, one_process(kind, optimizer, micro_batches, max_grad_norm))


@pytest.fixture(scope="module")
def processes() -> Iterator[gradwire.Cluster]:
    with gradwire.local(stage_servers=3) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "stages", "schedule", "optimizer", "max_grad_norm"),
    [
        ("gpt", 2, "1f1b", "adamw", None),
        ("gpt", 3, "gpipe", "sgd", 0.05),
        ("gpt", 3, "auto", "adamw", 0.05),
        ("regression", 3, "1f1b", "sgd", None),
    ],
)
def test_real_processes(
    processes: gradwire.Cluster, kind: str, stages: int, schedule: str, optimizer: str, max_grad_norm: float | None
) -> None:
    plan = gradwire.Plan(stages=stages, microbatches=8, schedule=schedule)
    made = on_cluster(processes, kind, optimizer, plan, max_grad_norm)
    check_equal(made, one_process(kind, optimizer, 8, max_grad_norm))


def test_dropout_draws_the_same_on_every_layout(processes: gradwire.Cluster) -> None:
    """Bit for bit, since nothing else differs: one draw a (seed, step, micro-batch, node)."""

    def train(stages: int, schedule: str, seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4))]
        model = nn.Sequential(*layers, nn.Linear(6, 3)).double()
        data = [regression_batch(12, step) for step in range(3)]
        with processes.trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss=F.mse_loss,
            example=data[0],
            plan=gradwire.Plan(stages=stages, microbatches=4, schedule=schedule),
            seed=seed,
        ) as trainer:
            losses = [result.loss for result in trainer.run(data, progress=False)]
            return losses, trainer.state_dict()

    losses, weights = train(1, "1f1b", seed=7)
    for stages, schedule in ((2, "1f1b"), (3, "gpipe")):
        other_losses, other_weights = train(stages, schedule, seed=7)
        assert other_losses == losses
        assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())
    assert train(2, "1f1b", seed=8)[0] != losses


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_dropout_equals_one_process(processes: gradwire.Cluster, stages: int) -> None:
    """With torch's layers as they are: the comparison's own process draws as the servers do."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Dropout(0.4, inplace=True), nn.Linear(8, 8))
    found = gradwire.verify(
        processes,
        model,
        lambda made: torch.optim.AdamW(made.parameters()),
        loss=F.mse_loss,
        batch=(torch.randn(7, 3, 8), torch.randn(7, 3, 8)),
        plan=gradwire.Plan(stages=stages, microbatches=3, recompute=stages == 3),
        max_grad_norm=0.5,
        double=True,
        seed=stages,
    )
    assert found.equal, str(found)
