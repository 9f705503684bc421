"""Models that make a number of their rows train in micro-batches of a fixed number of rows, as one process does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from torch import nn

import gradwire

ROWS = 4


class Numbered(nn.Module):
    """Loops over its rows, divides by their number and branches on it; export for any number of rows is impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.first(x)) / float(x.shape[0])
        rows = [self.second(x[row]) * (row + 1) for row in range(x.shape[0])]
        scores = self.third(torch.stack(rows) + table.mean(0))
        if x.shape[0] > 2:
            scores = scores + x
        return {"scores": scores, "mean": scores.mean(0)}


def loss(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output["scores"], target) + output["mean"].square().mean()


def make_batch(rows: int) -> tuple[torch.Tensor, Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, table, target = (torch.randn(size, 6, generator=generator).double() for size in (rows, 5, rows))
    return x, gradwire.unbatched(table), target


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    with cluster_in_process(tmp_path_factory.mktemp("rows"), stage_servers=3) as made:
        yield made


def make_model() -> Numbered:
    torch.manual_seed(0)
    return Numbered().double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(("stages", "rows"), [(1, 12), (2, 12), (3, 8), (3, 4)])
def test_a_step_equals_one_process(cluster: gradwire.Cluster, stages: int, rows: int) -> None:
    plan = gradwire.Plan(stages=stages, microbatches=3, recompute=stages == 2)
    found = gradwire.verify(
        cluster,
        make_model(),
        make_optimizer,
        loss=loss,
        batch=make_batch(rows),
        plan=plan,
        max_grad_norm=0.5,
        micro_batch_rows=ROWS,
    )
    assert found.equal, str(found)


def test_the_loop(cluster: gradwire.Cluster) -> None:
    """The example may have any number of rows; other batches are refused, and the run goes on."""
    model = make_model()
    optimizer = make_optimizer(model)
    with cluster.trainer(
        model,
        optimizer,
        loss=loss,
        example=make_batch(3),
        plan=gradwire.Plan(stages=2, microbatches=3),
        micro_batch_rows=ROWS,
    ) as trainer:
        batch = make_batch(8)
        with torch.no_grad():
            expected = [model(*(batch[0][part], batch[1].tensor)) for part in (slice(0, 4), slice(4, 8))]
            losses = [loss(made, batch[2][i * 4 : i * 4 + 4]).item() for i, made in enumerate(expected)]
        assert trainer.evaluate([batch]) == pytest.approx(sum(losses) / 2, rel=1e-12)
        scores = trainer.predict(*batch[:2])["scores"]
        torch.testing.assert_close(scores, torch.cat([made["scores"] for made in expected]), rtol=1e-12, atol=1e-12)
        for rows in (3, 13, 16):
            with pytest.raises(gradwire.BatchError, match=rf"4 or 8 or 12 rows.*Got: {rows} rows"):
                trainer.step(*make_batch(rows))
        with pytest.raises(gradwire.BatchError, match="of exactly 4"):
            trainer.evaluate([make_batch(5)])
        assert trainer.step(*batch).loss == pytest.approx(sum(losses) / 2, rel=1e-12)
        assert trainer.step(*make_batch(12)).step == 2


def test_without_a_fixed_number_the_error_says_how_to_fix_it(cluster: gradwire.Cluster) -> None:
    model = make_model()
    with pytest.raises(gradwire.ModelError, match=r"for some numbers of rows only.*micro_batch_rows"):
        cluster.trainer(model, make_optimizer(model), loss=loss, example=make_batch(8))
    with pytest.raises(gradwire.SettingsError, match="micro_batch_rows"):
        cluster.trainer(model, make_optimizer(model), loss=loss, example=make_batch(8), micro_batch_rows=0)
