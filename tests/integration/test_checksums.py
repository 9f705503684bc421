"""A run with checksums on a cluster: everything that travels is guarded, and nothing else is different."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from cluster_in_process import cluster_in_process
from torch import nn

import gradwire
from gradwire_protocol import frames
from gradwire_protocol.checksums import crc32c


def train(cluster: gradwire.Cluster, *, checksums: bool) -> tuple[list[float], torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    batches = [(torch.randn(10, 8), torch.randn(10, 3)) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = gradwire.Plan(stages=2, microbatches=3, checksums=checksums)
    with cluster.trainer(model, optimizer, loss=nn.functional.mse_loss, example=batches[0], plan=plan) as trainer:
        losses = [trainer.step(*batch).loss for batch in batches]
        return losses, trainer.predict(batches[0][0]), trainer.state_dict()


def test_a_run_with_checksums_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[int] = Counter()

    def counted(data: memoryview) -> int:
        made[checksum := crc32c(data)] += 1
        return checksum

    monkeypatch.setattr(frames, "crc32c", counted)
    with cluster_in_process(tmp_path, stage_servers=2) as cluster:
        plain = train(cluster, checksums=False)
        assert not made
        guarded = train(cluster, checksums=True)
    assert guarded[0] == plain[0]
    assert torch.equal(guarded[1], plain[1])
    assert all(torch.equal(guarded[2][name], tensor) for name, tensor in plain[2].items())
    # One by the sender, one by the receiver.
    assert sum(made.values()) > 50
    assert all(count % 2 == 0 for count in made.values())
