"""Planning runs with replicas or shards anew: cuts move, micro-batches are dealt out by speed, nothing else changes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from cluster_in_process import Rig
from cluster_processes import wait_until_free
from equivalence_subject import KINDS, OPTIMIZERS, allowed_cuts, batches, check_equal, kept_model, one_process
from torch import nn

import gradwire
from gradwire.checkpoint.run import RunCheckpoints
from gradwire_coordinator.log import RunLog
from gradwire_protocol.errors import CheckpointError, PlanError

pytest_plugins = ("replan_rig",)


def make_trainer(
    cluster: gradwire.Cluster,
    kind: str,
    optimizer: str | torch.optim.Optimizer,
    model: nn.Module | None = None,
    **changes: Any,
) -> gradwire.Trainer:
    model = model or kept_model(kind)
    plan = gradwire.Plan(**({"microbatches": 8, "schedule": "1f1b", "replicas": 2} | changes))
    made = OPTIMIZERS[optimizer](model) if isinstance(optimizer, str) else optimizer
    return cluster.trainer(model, made, loss=KINDS[kind][2], example=batches(kind)[0], plan=plan)


@pytest.mark.parametrize(
    ("kind", "optimizer", "fields"),
    [
        ("gpt", "adamw", {"zero": "on"}),
        ("regression", "sgd", {"zero": "off"}),
        ("gpt", "adamw", {"replicas": 1, "tensor": 2, "tensor_plan": "gpt"}),
    ],
)
def test_training_goes_on_as_if_nothing_had_happened(
    rig: Rig, as_predicted: None, whatever_it_gains: None, kind: str, optimizer: str, fields: dict[str, Any]
) -> None:
    """The optimizer's state on one replica each, on both, or in parts on shards; tied weights, and momentum."""
    losses, gradients = [], []
    model = kept_model(kind)
    of_user = OPTIMIZERS[optimizer](model)
    scheduler = torch.optim.lr_scheduler.StepLR(of_user, step_size=2, gamma=0.5)
    # Most of it on the second stage.
    with make_trainer(rig.cluster, kind, of_user, model, stages=2, cuts=allowed_cuts(kind)[:1], **fields) as trainer:
        before = [stage.nodes for stage in trainer.plan.stages]
        for number, (x, y) in enumerate(batches(kind)):
            if number == 2:
                servers = trainer.servers
                made = trainer.replan(minimum_gain=0.0)
                assert made.moved, str(made)
                assert made.tensors > 0
                assert [stage.nodes for stage in trainer.plan.stages] != before
                # Who is where, stays.
                assert trainer.servers == servers
                assert trainer.steps_done == 2
            result, gradient = trainer.step_with_gradients(x, y)
            scheduler.step()
            losses.append(result.loss)
            gradients.append(gradient)
        weights = trainer.state_dict()
        status = rig.cluster.status().runs[0]
        assert (status.run, status.generation, status.step) == (trainer.run_id, 2, 4)
        with RunLog(rig.directory, read_only=True) as log:
            kinds = [(entry.generation, entry.WhichOneof("kind")) for entry in log.entries(trainer.run_id)]
    moved = kinds.index((2, "new_plan"))
    assert kinds[moved + 1] == (2, "load_state")
    assert all(generation == 1 for generation, _ in kinds[:moved])
    check_equal((losses, gradients, weights), one_process(kind, optimizer, 8, None))


def test_a_slow_replica_gets_fewer_micro_batches(rig: Rig, pace: dict[str, float]) -> None:
    """The second takes three times as long for everything: a quarter of the work is its share, or a little more."""
    data = batches("regression")[0]
    # Long beside what the machine takes for anything else.
    pace |= {"stage-0": 6.0, "stage-1": 18.0}
    with make_trainer(rig.cluster, "regression", "adamw", stages=1) as trainer:
        assert trainer.plan.replica_shares == (0.5, 0.5)
        slow = trainer.servers.index("stage-1")
        for _ in range(3):
            trainer.step(*data)
        before = trainer.report().seconds.measured
        made = trainer.replan()
        assert made.moved, str(made)
        assert made.tensors == 0
        assert str(made).startswith("the work is dealt out anew")
        assert 0.2 < trainer.plan.replica_shares[slow] < 0.375
        for _ in range(3):
            result = trainer.step(*data)
        assert result.step == 6
        assert trainer.report().seconds.measured < before
        assert not trainer.replan(minimum_gain=0.3).moved


@pytest.mark.parametrize(
    ("fields", "relative", "absolute"),
    [
        # Blocks of other buckets have other scales: as close to a run that never moved as int8 is.
        ({"compression": "int8"}, 2e-2, 2e-3),
        # Between two averages, with momentum inside and outside.
        ({"exchange": "local", "every": 3}, 1e-10, 1e-12),
    ],
)
def test_what_only_one_replica_has_is_not_lost(
    rig: Rig,
    as_predicted: None,
    whatever_it_gains: None,
    fields: dict[str, Any],
    relative: float,
    absolute: float,
) -> None:
    data = batches("regression")[0]
    cuts = allowed_cuts("regression")

    def weights(move: bool) -> dict[str, torch.Tensor]:
        asked = fields | ({"cuts": cuts[:1]} if move else {})
        with make_trainer(rig.cluster, "regression", "sgd", stages=2, **asked) as trainer:
            for _ in range(5):
                trainer.step(*data)
            if move:
                assert trainer.replan(minimum_gain=0.0).moved
            for _ in range(4):
                trainer.step(*data)
            return trainer.state_dict()

    moved, still = weights(True), weights(False)
    for name, tensor in still.items():
        assert torch.allclose(moved[name], tensor, rtol=relative, atol=absolute), name


def test_what_cannot_be_saved_leaves_the_run_as_it_was(
    rig: Rig, as_predicted: None, whatever_it_gains: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches("regression")[0]
    with make_trainer(rig.cluster, "regression", "sgd", stages=2, cuts=allowed_cuts("regression")[:1]) as trainer:
        for _ in range(2):
            trainer.step(*data)
        with monkeypatch.context() as patch:
            patch.setattr(RunCheckpoints, "save", _refuse)
            with pytest.raises(CheckpointError, match="disk is full"):
                trainer.replan(minimum_gain=0.0)
        assert trainer.step(*data).step == 3
        assert rig.cluster.status().runs[0].generation == 1
        # Once it has moved there is no way back.
        with monkeypatch.context() as patch:
            patch.setattr(RunCheckpoints, "load", _refuse)
            began = time.monotonic()
            with pytest.raises(CheckpointError, match="disk is full"):
                trainer.replan(minimum_gain=0.0)
            # Nobody else could say why.
            assert time.monotonic() - began < 8
        with pytest.raises(CheckpointError, match="disk is full"):
            trainer.step(*data)
    wait_until_free(rig.cluster)


def _refuse(*_: Any) -> None:
    raise CheckpointError("The disk is full")


def test_with_parameter_servers_nothing_is_planned_anew() -> None:
    data = batches("regression")[0]
    with (
        gradwire.local(stage_servers=2, parameter_servers=1) as cluster,
        make_trainer(cluster, "regression", "sgd", stages=1, exchange="parameter-server") as trainer,
    ):
        for _ in range(3):
            trainer.step(*data)
        with pytest.raises(PlanError, match="cannot be planned anew") as caught:
            trainer.replan()
        assert "ring" in caught.value.expected
        assert trainer.step(*data).step == 4
