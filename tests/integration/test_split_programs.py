"""Programs whose backwards come in two parts, on stage servers over real gRPC: what programs with whole ones give."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from stage_cluster import Cluster
from stage_model import MEAN, SUM, Reference

LAYOUTS = {
    "one server": {"A": [0, 1, 2]},
    "three servers": {"A": [0], "B": [1], "C": [2]},
    "virtual stages": {"A": [0, 2], "B": [1]},
}
MICRO_BATCHES = 4


class SplitCluster(Cluster):
    """A cluster whose programs split the backwards of some micro-batches."""

    def __init__(self, layout: dict[str, list[int]], form: int, split: Collection[int], *, recompute: bool) -> None:
        self.split = split
        self.recompute = recompute
        super().__init__(layout, form)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(7, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, y


def trained(
    layout: dict[str, list[int]], form: int, split: Collection[int], *, recompute: bool = False
) -> tuple[dict[str, torch.Tensor], list[float], list[set[str]]]:
    """Return the state after two steps with clipping, the losses, and the phases of each server in the last step."""
    losses = []
    with SplitCluster(layout, form, split, recompute=recompute) as cluster:
        cluster.open()
        for step in range(2):
            cluster.submit_step(*batch(step), MICRO_BATCHES, max_gradient_norm=0.5)
            reports = cluster.reports()
            losses.append(cluster.loss(reports))
        phases = [
            {phase for phase, spent in report.timing.busy_seconds.items() if spent > 0} for report in reports.values()
        ]
        return cluster.state(), losses, phases


@pytest.mark.parametrize("form", [MEAN, SUM], ids=["mean", "sum and weight"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_split_gives_what_a_whole_backward_gives(layout: dict[str, list[int]], form: int) -> None:
    state, losses, phases = trained(layout, form, ())
    assert all("weight" not in item for item in phases)
    got, got_losses, phases = trained(layout, form, range(MICRO_BATCHES))
    assert all({"backward", "weight"} <= item for item in phases)
    assert got_losses == pytest.approx(losses, rel=1e-13)
    for name, value in state.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12)
    recomputed, recomputed_losses, _ = trained(layout, form, range(MICRO_BATCHES), recompute=True)
    assert recomputed_losses == got_losses
    for name, value in got.items():
        assert torch.equal(recomputed[name], value), name


def test_some_of_the_backwards_may_be_split() -> None:
    model = Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        x, y = batch(step)
        torch.nn.functional.mse_loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    state, _, _ = trained(LAYOUTS["virtual stages"], MEAN, (0, 2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)
