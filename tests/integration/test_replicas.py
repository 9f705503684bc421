"""Replicas over real processes: training, evaluation, prediction and checkpoints equal one process, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equivalence_subject import (
    TOLERANCE,
    check_equal,
    kept_model,
    make_model,
    on_cluster,
    one_process,
    random_cuts,
    regression_batch,
)
from torch import nn

import gradwire
from gradwire_protocol.errors import PlanError


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    with gradwire.local(stage_servers=6, checkpoint_root=tmp_path_factory.mktemp("checkpoints")) as made:
        yield made


def plan(stages: int, replicas: int, micro_batches: int, kind: str = "regression", **fields: Any) -> gradwire.Plan:
    cuts = random_cuts(kind, stages, seed=stages) if stages > 1 else None
    fields = {"schedule": "1f1b", "cuts": cuts, **fields}
    return gradwire.Plan(stages=stages, replicas=replicas, microbatches=micro_batches, **fields)


@pytest.mark.parametrize(
    ("kind", "stages", "replicas", "micro_batches", "schedule", "max_grad_norm", "zero"),
    [
        ("regression", 1, 2, 2, "1f1b", None, "off"),
        ("regression", 2, 2, 5, "gpipe", 0.05, "on"),
        ("regression", 2, 3, 8, "zb-h1", None, "off"),
        # Tied copies on both stages, a loss with a weight of its own.
        ("gpt", 1, 3, 8, "1f1b", 0.05, "on"),
        ("gpt", 2, 2, 5, "1f1b", None, "off"),
    ],
)
def test_replicas_equal_one_process(
    cluster: gradwire.Cluster,
    kind: str,
    stages: int,
    replicas: int,
    micro_batches: int,
    schedule: str,
    max_grad_norm: float | None,
    zero: str,
) -> None:
    """Losses, every gradient and every weight. Micro-batches that do not divide evenly, and batches of unlike rows."""
    asked = plan(stages, replicas, micro_batches, kind, schedule=schedule, zero=zero)
    made = on_cluster(cluster, kind, "adamw", asked, max_grad_norm)
    check_equal(made, one_process(kind, "adamw", micro_batches, max_grad_norm))


def trainer(cluster: gradwire.Cluster, asked: gradwire.Plan, **fields: Any) -> gradwire.Trainer:
    model = kept_model("regression")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return cluster.trainer(model, optimizer, loss=F.mse_loss, example=regression_batch(8, 0), plan=asked, **fields)


def reference(steps: list[tuple[torch.Tensor, torch.Tensor]], max_grad_norm: float | None = None) -> nn.Module:
    model = make_model("regression")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in steps:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return model


def check_weights(made: dict[str, torch.Tensor], model: nn.Module) -> None:
    for name, weight in model.state_dict().items():
        assert (made[name] - weight).abs().max().item() <= TOLERANCE * weight.abs().max().item(), name


def test_a_replica_without_a_micro_batch_takes_part_in_the_step(cluster: gradwire.Cluster) -> None:
    """The second batch has 1 row, so that two of three replicas have none; steps in flight, and norms to exchange."""
    steps = [regression_batch(rows, seed) for seed, rows in enumerate((8, 1, 2, 8))]
    with trainer(cluster, plan(2, 3, 4), max_grad_norm=0.1) as training:
        losses = [result.loss for result in training.run(steps, progress=False)]
        assert len(losses) == 4
        x, y = steps[1]
        model = reference(steps, 0.1)
        assert training.evaluate([(x, y)]) == pytest.approx(F.mse_loss(model(x), y).item(), rel=TOLERANCE)
        assert torch.allclose(training.predict(x), model(x), rtol=TOLERANCE, atol=1e-12)
        check_weights(training.state_dict(), model)


def test_evaluation_and_prediction_go_over_all_replicas_in_order(cluster: gradwire.Cluster) -> None:
    batches = [regression_batch(rows, seed) for seed, rows in enumerate((7, 5))]
    model = make_model("regression")
    with trainer(cluster, plan(1, 2, 4)) as training:
        total = sum(F.mse_loss(model(x), y, reduction="sum").item() for x, y in batches)
        assert training.evaluate(batches) == pytest.approx(total / (12 * 3), rel=TOLERANCE)
        x = batches[0][0]
        assert torch.allclose(training.predict(x), model(x), rtol=TOLERANCE, atol=1e-12)


def test_masked_tokens_weigh_nothing_in_any_replica(cluster: gradwire.Cluster) -> None:
    """Rows with very different numbers of tokens that count: a mean of replicas' means would be another loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)).double()
    tokens = torch.randint(0, 11, (6, 5))
    target = torch.randint(0, 11, (6, 5))
    target[0, 1:] = target[2] = -100

    def loss(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores.flatten(0, 1), target.flatten())

    found = gradwire.verify(
        cluster,
        model,
        lambda made: torch.optim.AdamW(made.parameters()),
        loss=loss,
        batch=(tokens, target),
        plan=gradwire.Plan(stages=2, replicas=2, microbatches=3, schedule="1f1b", cuts=["1"]),
        max_grad_norm=0.1,
        double=True,
    )
    assert found.equal, str(found)


@pytest.mark.parametrize(
    ("before", "after", "storage"),
    [((2, 2), (1, 1), "client"), ((1, 1), (1, 3), "client"), ((2, 2), (1, 1), "server"), ((1, 1), (1, 3), "server")],
)
def test_a_checkpoint_goes_to_another_number_of_replicas(
    cluster: gradwire.Cluster, tmp_path: Path, before: tuple[int, int], after: tuple[int, int], storage: Any
) -> None:
    path = tmp_path / "saved" if storage == "client" else Path(f"of-{before[1]}")
    steps = [regression_batch(rows, seed) for seed, rows in enumerate((8, 8, 7))]
    with trainer(cluster, plan(*before, 4)) as training:
        for x, y in steps[:2]:
            training.step(x, y)
        training.save(path, storage=storage)
    with trainer(cluster, plan(*after, 4)) as training:
        training.load(path, storage=storage)
        assert training.step(*steps[2]).step == 3
        check_weights(training.state_dict(), reference(steps))


def test_what_a_run_with_replicas_tells_of_itself(cluster: gradwire.Cluster) -> None:
    with trainer(cluster, plan(2, 2, 4)) as training:
        made = training.plan
        assert (made.replicas, made.replica_shares, made.compression) == (2, (0.5, 0.5), "none")
        assert [server.replica for server in made.servers] == [0, 0, 1, 1]
        assert [server.position for server in made.servers] == [0, 1, 0, 1]
        assert all(server.reduce_seconds > 0 for server in made.servers)
        for seed in range(3):
            training.step(*regression_batch(8, seed))
        report = training.report()
        assert [server.name for server in report.servers] == [
            f"server {position} (stage {position}) of replica {replica}" for replica in (0, 1) for position in (0, 1)
        ]
        assert not training.replan(minimum_gain=0.99).moved
        assert training.step(*regression_batch(8, 3)).step == 4


def test_too_few_servers_are_told_with_their_number(cluster: gradwire.Cluster) -> None:
    with pytest.raises(PlanError, match="takes 8 servers"):
        trainer(cluster, plan(2, 4, 4))
