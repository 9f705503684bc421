"""Copies of one tensor on several servers stay bit-identical: tied parameters, and buffers that several stages read."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from torch import nn

import gradwire
from gradwire_stage.service import StageService


class Shared(nn.Module):
    """First and last layer share a weight; all layers read a buffer that is saved and one that is not."""

    scale: torch.Tensor
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.layers[5].weight = self.layers[0].weight
        self.register_buffer("scale", torch.rand(6) + 0.5)
        self.register_buffer("table", torch.rand(6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) * self.scale) + self.table
        return x


def copies(services: list[StageService]) -> dict[str, list[torch.Tensor]]:
    """The tensors that the servers of the run hold, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    for service in services:
        held = service.holder.current
        assert held is not None
        for name, tensor in held.run.tensors.items():
            found.setdefault(name, []).append(tensor)
    return found


def test_copies_are_bit_identical_after_100_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared()
    before = model.layers[0].weight.detach().clone()
    services: list[StageService] = []
    with cluster_in_process(tmp_path, 3, services) as cluster:
        data = [(torch.randn(5, 6), torch.randn(5, 6)) for _ in range(10)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        plan = gradwire.Plan(stages=3, microbatches=3)
        with cluster.trainer(
            model, optimizer, loss=F.mse_loss, example=data[0], plan=plan, max_grad_norm=0.5
        ) as trainer:
            assert [result.step for result in trainer.run(data, steps=100, progress=False)] == list(range(1, 101))
            found = copies(services)
            assert not torch.equal(found["layers.0.weight"][0], before)
            assert {name: len(tensors) for name, tensors in found.items() if len(tensors) > 1} == {
                "layers.0.weight": 2,
                "scale": 3,
                "table": 3,
            }
            for name, tensors in found.items():
                assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name
