"""Stage servers on two hosts with a shaped link between them: what "auto" makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from network import NoNetwork, TwoHosts, cluster_on, two_hosts
from torch import nn

import gradwire
from gradwire.boundaries import boundary_lines
from gradwire_protocol.v1 import tensors_pb2 as pb

WIDTH = 768


@pytest.fixture(scope="module")
def network() -> Iterator[TwoHosts]:
    try:
        with two_hosts() as made:
            yield made
    except NoNetwork as reason:
        pytest.skip(f"no network namespaces with a shaped link here: {reason}")


def train(cluster: gradwire.Cluster, codec: str, steps: int = 2) -> tuple[list[float], gradwire.StepResult, list[str]]:
    """Train layers that compute long for what they send; return losses, the last result, and the plan's boundaries."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(40)))
    batch = (torch.randn(128, WIDTH), torch.randn(128, WIDTH))
    with cluster.trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-2),
        loss=nn.functional.mse_loss,
        example=batch,
        plan=gradwire.Plan(stages=2, microbatches=8, cuts=["20"], activation_compression=codec),
    ) as trainer:
        results = [trainer.step(*batch) for _ in range(steps)]
        return [result.loss for result in results], results[-1], list(boundary_lines(trainer.plan))


# Where other processes take the processors, what is measured of an unshaped link is anything.
@pytest.mark.parametrize(
    ("megabits", "codec", "least", "most"), [(10.0, pb.CODEC_INT8, 7, 11), (None, pb.CODEC_NONE, 100, 1e6)]
)
def test_auto_is_int8_on_a_slow_link_and_none_on_a_fast_one(
    network: TwoHosts, tmp_path: Path, megabits: float | None, codec: pb.Codec, least: float, most: float
) -> None:
    network.shape(None if megabits is None else megabits * 1e6)
    with cluster_on(network, tmp_path) as cluster:
        losses, _, (line,) = train(cluster, "auto")
        name = "int8" if codec == pb.CODEC_INT8 else "none"
        assert line.startswith(f"boundary 0→1: {name}, link "), line
        measured = float(line.partition("link ")[2].partition(" Mbit/s")[0].replace(",", ""))
        assert least <= measured <= most, line
        if megabits is None:
            return
        plain, slow, lines = train(cluster, "none")
        assert lines == []
        assert losses == pytest.approx(plain, rel=1e-3)
        assert losses != plain
        # 128 × 768 float32 there, and as much back at the same time.
        assert slow.seconds > 128 * WIDTH * 4 * 8 / (megabits * 1e6)
