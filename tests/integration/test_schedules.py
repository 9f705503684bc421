"""Every schedule equals one process, whatever number of stages a server has: in float64 within 1e-10, on real servers.

Orders, bounds and simulations have unit tests of their own; cuts and optimizers are varied in test_equivalence.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoint_subject import Model, make_batches, sgd
from cluster_in_process import cluster_in_process
from equivalence_subject import check_equal, on_cluster, one_process, random_cuts

import gradwire
from gradwire_protocol.activities import stage_lines
from gradwire_protocol.errors import PlanError


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with cluster_in_process(directory, stage_servers=4, heartbeat_seconds=0.2) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "servers", "schedule", "virtual_stages", "micro_batches", "optimizer", "max_grad_norm"),
    [
        ("gpt", 3, "zb-h1", 1, 8, "adamw", None),
        ("regression", 4, "zb-h1", 1, 2, "sgd", 0.05),
        ("gpt", 2, "interleaved-1f1b", 2, 8, "adamw", 0.05),
        ("gpt", 4, "interleaved-1f1b", 2, 2, "sgd", None),
        ("regression", 3, "interleaved-1f1b", 3, 8, "sgd", None),
        # The tied embedding and head are on one server here, and on two above.
        ("gpt", 2, "zb-v", 2, 8, "sgd", 0.05),
        ("gpt", 4, "zb-v", 2, 8, "adamw", None),
        ("regression", 3, "zb-v", 2, 2, "adamw", 0.05),
        ("gpt", 1, "zb-v", 2, 2, "sgd", None),
        ("gpt", 2, "auto", 1, 8, "adamw", 0.05),
        ("regression", 2, "auto", 2, 8, "sgd", 0.05),
        ("gpt", 2, "auto", 3, 2, "adamw", None),
    ],
)
def test_every_schedule(
    cluster: gradwire.Cluster,
    kind: str,
    servers: int,
    schedule: str,
    virtual_stages: int,
    micro_batches: int,
    optimizer: str,
    max_grad_norm: float | None,
) -> None:
    """One of the four batches has fewer rows than the eight micro-batches; two of them are fewer than most servers."""
    plan = gradwire.Plan(
        stages=servers,
        virtual_stages=virtual_stages,
        microbatches=micro_batches,
        schedule=schedule,
        cuts=random_cuts(kind, servers * virtual_stages, seed=servers + micro_batches),
    )
    made = on_cluster(cluster, kind, optimizer, plan, max_grad_norm)
    check_equal(made, one_process(kind, optimizer, micro_batches, max_grad_norm))


MODEL = Model(dropout=0.0).double()
START = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}


def plan_of(schedule: str, servers: int, **changes: Any) -> gradwire.Plan:
    return gradwire.Plan(stages=servers, microbatches=4, schedule=schedule, **changes)


def trained(cluster: gradwire.Cluster, plan: gradwire.Plan) -> dict[str, Any]:
    """Return what a few steps, an evaluation and a prediction give."""
    # 24 rows in parts of 6; with fewer, batch normalisation makes a rounding error many times larger.
    batches = [tuple(torch.cat(parts) for parts in zip(*make_batches(3), strict=True))] * 3
    with cluster.trainer(
        MODEL, sgd(MODEL), loss=F.cross_entropy, example=batches[0], plan=plan, max_grad_norm=0.5
    ) as trainer:
        losses = [result.loss for result in trainer.run(batches, progress=False)]
        return {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "evaluated": torch.tensor(trainer.evaluate(batches[1:]), dtype=torch.float64),
            "predicted": trainer.predict(batches[0][0][:3]),
            **trainer.state_dict(),
        }


@pytest.fixture(scope="module")
def on_one_stage(cluster: gradwire.Cluster) -> dict[str, Any]:
    return trained(cluster, plan_of("gpipe", 1))


@pytest.mark.parametrize(
    ("schedule", "servers", "changes"),
    [
        ("interleaved-1f1b", 2, {}),
        ("interleaved-1f1b", 3, {"recompute": True}),
        ("zb-v", 2, {"recompute": True}),
        ("zb-v", 3, {"checksums": True}),
        ("auto", 2, {"virtual_stages": 2}),
    ],
)
def test_buffers_ties_and_frozen_layers_with_several_stages_a_server(
    cluster: gradwire.Cluster,
    on_one_stage: dict[str, Any],
    schedule: str,
    servers: int,
    changes: dict[str, Any],
) -> None:
    """Batch normalisation sees micro-batches in order; evaluation and prediction go through all stages."""
    if "checksums" in changes:
        pytest.importorskip("google_crc32c")
    made = trained(cluster, plan_of(schedule, servers, **changes))
    assert made.keys() == on_one_stage.keys()
    for name, value in on_one_stage.items():
        torch.testing.assert_close(made[name], value, rtol=1e-10, atol=1e-12)
    assert not torch.equal(made["norm.running_mean"], START["norm.running_mean"])


def test_the_plan_that_is_carried_out_says_where_stages_are(cluster: gradwire.Cluster) -> None:
    batch = make_batches(1)[0]
    plan = plan_of("zb-v", 2, activation_compression="bf16")
    with cluster.trainer(MODEL, sgd(MODEL), loss=F.cross_entropy, example=batch, plan=plan) as trainer:
        carried_out = trainer.plan
        trainer.step(*batch)
        lines: list[str] = []
        deadline = time.monotonic() + 10.0
        while len(lines) < 2 and time.monotonic() < deadline:  # servers tell by heartbeat
            status = cluster.status()
            lines = stage_lines([(each.server, each.activity, 0.0) for each in status.servers]).get(
                status.runs[0].run, []
            )
    assert [stage.server for stage in carried_out.stages] == [0, 1, 1, 0]
    # Between stages of one server nothing travels.
    assert [stage.codec for stage in carried_out.stages] == ["bf16", "none", "bf16", "none"]
    assert carried_out.schedule == "zb-v"
    assert 0 < carried_out.theoretical_bubble_ratio < 0.2
    assert [line[:12] for line in lines] == ["stages 0, 3 ", "stages 1, 2 "]


def test_too_many_stages_for_a_model_are_refused(cluster: gradwire.Cluster) -> None:
    batch = make_batches(1)[0]
    with pytest.raises(PlanError, match=r"cannot be cut into 64 stages"):
        cluster.trainer(
            MODEL,
            sgd(MODEL),
            loss=F.cross_entropy,
            example=batch,
            plan=plan_of("interleaved-1f1b", 4, virtual_stages=16),
        )
