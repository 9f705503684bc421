"""Training on a cluster equals one process: losses, every gradient, every updated weight, in float64 within 1e-10."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from equivalence_subject import (
    KINDS,
    OPTIMIZERS,
    check_equal,
    on_cluster,
    one_process,
    random_cuts,
    regression_batch,
)
from torch import nn

import gradwire


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
    four_processes: gradwire.Cluster, kind: str, stages: int, schedule: str, optimizer: str, max_grad_norm: float | None
) -> None:
    plan = gradwire.Plan(stages=stages, microbatches=8, schedule=schedule)
    made = on_cluster(four_processes, kind, optimizer, plan, max_grad_norm)
    check_equal(made, one_process(kind, optimizer, 8, max_grad_norm))


def test_dropout_draws_the_same_on_every_layout(four_processes: gradwire.Cluster) -> None:
    """Bit for bit, since nothing else differs: one draw a (seed, step, micro-batch, node)."""

    def train(stages: int, schedule: str, seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.4))]
        model = nn.Sequential(*layers, nn.Linear(6, 3)).double()
        data = [regression_batch(12, step) for step in range(3)]
        with four_processes.trainer(
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
    for stages, schedule in ((2, "1f1b"), (3, "gpipe"), (2, "zb-v"), (3, "interleaved-1f1b")):
        other_losses, other_weights = train(stages, schedule, seed=7)
        assert other_losses == losses
        assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())
    assert train(2, "1f1b", seed=8)[0] != losses


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_dropout_equals_one_process(four_processes: gradwire.Cluster, stages: int) -> None:
    """With torch's layers as they are: the comparison's own process draws as the servers do."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Dropout(0.4, inplace=True), nn.Linear(8, 8))
    found = gradwire.verify(
        four_processes,
        model,
        lambda made: torch.optim.AdamW(made.parameters()),
        loss=F.mse_loss,
        batch=(torch.randn(7, 3, 8), torch.randn(7, 3, 8)),
        plan=gradwire.Plan(
            stages=stages, microbatches=3, recompute=stages == 3, schedule="zb-v" if stages == 2 else "auto"
        ),
        max_grad_norm=0.5,
        double=True,
        seed=stages,
    )
    assert found.equal, str(found)
