"""What Prometheus reads of a real run: every second, every byte, and that memory follows the plan."""

from __future__ import annotations

import time

import pytest
import torch
from prometheus_pages import scrape, scrape_settled, total

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from gradwire_protocol.v1 import coordinator_pb2

STEPS = 3


def servers_of(cluster: gradwire.Cluster, run: str, count: int) -> list[coordinator_pb2.ServerStatus]:
    """The servers of a run, by their stages, as soon as their heartbeats tell."""
    deadline = time.monotonic() + 10
    while True:
        found = [server for server in cluster.status().servers if server.activity.run == run]
        if len(found) == count or time.monotonic() > deadline:
            return sorted(found, key=lambda server: list(server.activity.stages))
        time.sleep(0.05)


def test_a_run_shows_every_second_every_byte_and_only_its_own_parameters(
    four_processes: gradwire.LocalCluster,
) -> None:
    torch.manual_seed(0)
    model = GPT(Shape(layers=4, width=32, heads=2, context=16))
    text = torch.randint(0, 256, (8, 17))
    batch = (text[:, :-1].contiguous(), text[:, 1:].contiguous())
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    tied = model.embedding.weight.nbytes
    with four_processes.trainer(
        model,
        torch.optim.AdamW(model.parameters()),
        loss=next_byte_loss,
        example=batch,
        plan=gradwire.Plan(stages=2, microbatches=4),
    ) as trainer:
        results = [trainer.step(*batch) for _ in range(STEPS)]
        run = trainer.run_id
        # What the plan says of the cut is what travels, and all of it has a gradient.
        planned = trainer.plan.stages[0].boundary_bytes * STEPS
        servers = servers_of(four_processes, run, count=2)
        stages = scrape_settled((server.metrics_address for server in servers), run)
    assert {total(samples, "gradwire_up") for samples in stages} == {1}
    for stage, samples in enumerate(stages):
        busy = total(samples, "gradwire_stage_busy_seconds_total", run=run, stage=str(stage))
        idle = total(samples, "gradwire_stage_idle_seconds_total", run=run, stage=str(stage))
        steps = total(samples, "gradwire_step_duration_seconds_count", run=run)
        assert steps == STEPS
        # Windows follow each other without a gap: taking the weights, then the steps.
        assert busy + idle >= total(samples, "gradwire_step_duration_seconds_sum", run=run) - 1e-6
        assert busy > 0 < idle
        forward, backward = ("sent", "received") if stage == 0 else ("received", "sent")
        assert total(samples, "gradwire_transfer_bytes_total", direction=forward, kind="forward", run=run) == planned
        assert total(samples, "gradwire_transfer_bytes_total", direction=backward, kind="backward", run=run) == planned
        assert total(samples, "gradwire_transfer_seconds_count", run=run) > 0
    assert total(stages[1], "gradwire_loss", run=run) == pytest.approx(results[-1].loss)
    # No parameter is on two servers, but the tied one; the positions' constant is on one of them.
    held = sum(total(samples, "gradwire_parameters_bytes", run=run) for samples in stages)
    assert sum(sizes.values()) + tied <= held <= sum(sizes.values()) + tied + 64 * 16
    assert max(total(samples, "gradwire_parameters_bytes", run=run) for samples in stages) < 0.7 * held

    after = [scrape(server.metrics_address) for server in servers]
    assert all(run not in dict(labels).values() for samples in after for _, labels in samples)
