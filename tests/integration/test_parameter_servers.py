"""Parameter servers over real processes: equal to one process, late on request, and named when they fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replica_subject import (
    check_first_step,
    check_replicas_are_one,
    check_weights,
    make_batch,
    make_model,
    one_process,
    train,
)

import gradwire


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.LocalCluster]:
    root = tmp_path_factory.mktemp("checkpoints")
    with gradwire.local(stage_servers=4, parameter_servers=2, checkpoint_root=root) as made:
        yield made


def with_servers(cluster: gradwire.Cluster, optimizer: str = "AdamW", **fields: Any) -> gradwire.Trainer:
    return train(cluster, optimizer, **{"exchange": "parameter-server", "parameter_servers": 2, **fields})


@pytest.mark.parametrize(
    ("stages", "replicas", "micro_batches", "optimizer"), [(2, 2, 5, "AdamW"), (1, 3, 4, "Adafactor"), (2, 1, 4, "SGD")]
)
def test_synchronous_servers_equal_one_process(
    cluster: gradwire.Cluster, stages: int, replicas: int, micro_batches: int, optimizer: str
) -> None:
    """Gradients as the optimizer saw them, the norm, and weights."""
    asked = {"stages": stages, "replicas": replicas, "cuts": ["2"] if stages > 1 else None}
    with with_servers(cluster, optimizer, microbatches=micro_batches, **asked) as trainer:
        check_first_step(trainer)
        trainer.step(*make_batch(1))
        check_weights(trainer.state_dict(), one_process(2, optimizer))
        x, y = make_batch(2)
        assert trainer.evaluate([(x, y)]) == pytest.approx(
            F.mse_loss(one_process(2, optimizer)(x), y).item(), rel=1e-10
        )


@pytest.mark.parametrize("storage", ["client", "server"])
def test_checkpoints_go_from_servers_to_one_process_and_back(
    cluster: gradwire.Cluster, tmp_path: Path, storage: Any
) -> None:
    first, second = (Path(name) if storage == "server" else tmp_path / name for name in ("a", "b"))
    with with_servers(cluster) as trainer:
        for seed in range(2):
            trainer.step(*make_batch(seed))
        trainer.save(first, storage=storage)
    with train(cluster, stages=1, replicas=1, cuts=None) as trainer:
        trainer.load(first, storage=storage)
        trainer.step(*make_batch(2))
        trainer.save(second, storage=storage)
    with with_servers(cluster, stages=1, cuts=None) as trainer:
        trainer.load(second, storage=storage)
        trainer.step(*make_batch(3))
        check_weights(trainer.state_dict(), one_process(4))
        check_replicas_are_one(trainer)


def test_a_resumed_run_is_the_one_that_was_not_interrupted(cluster: gradwire.Cluster, tmp_path: Path) -> None:
    """Every bit, as long as nothing is late and no codec leaves anything out."""
    with with_servers(cluster) as trainer:
        for seed in range(3):
            trainer.step(*make_batch(seed))
        trainer.save(tmp_path / "a")
        losses = [trainer.step(*make_batch(seed)).loss for seed in range(3, 6)]
        state = trainer.state_dict()
    with with_servers(cluster) as trainer:
        trainer.load(tmp_path / "a")
        assert [trainer.step(*make_batch(seed)).loss for seed in range(3, 6)] == losses
        for name, weight in trainer.state_dict().items():
            assert torch.equal(weight, state[name]), name


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_pushes_and_pulls_are_encoded_and_holders_stay_alike(cluster: gradwire.Cluster, codec: str) -> None:
    with with_servers(cluster, compression=codec) as trainer:
        losses = [trainer.step(*make_batch(0)).loss for _ in range(8)]
        assert losses[-1] < losses[0]
        check_replicas_are_one(trainer)
        # The optimizer's own weights are exact: what is lost on the way to the holders comes later.
        exact = one_process(0, model=None).state_dict()
        assert all(not torch.equal(value, exact[name]) for name, value in trainer.state_dict().items())


def test_late_weights_are_late_by_no_more_than_asked_and_all_there_for_who_reads_them(
    cluster: gradwire.Cluster,
) -> None:
    with with_servers(cluster, staleness=2, stages=1, cuts=None) as trainer:
        assert trainer._plan.window == 3
        losses = [result.loss for result in trainer.run([make_batch(0)], steps=30, progress=False)]
        assert losses[-1] < 0.8 * losses[0]
        model = make_model()
        model.load_state_dict(trainer.state_dict())
        x, y = make_batch(1)
        assert trainer.evaluate([(x, y)]) == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-10)
        check_replicas_are_one(trainer)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"compression": "topk"}, "Parameter servers cannot work with"),
        ({"parameter_servers": 3}, "takes 3 parameter servers, but 2"),
        ({"staleness": 99}, "staleness: 0 to"),
        ({"zero": "on"}, "parameter servers have it"),
        ({"exchange": "ring"}, "of no use to this exchange"),
    ],
)
def test_what_cannot_be_is_refused(cluster: gradwire.Cluster, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(gradwire.PlanError, match=expected):
        with_servers(cluster, **fields)


@pytest.mark.fault
def test_a_parameter_server_that_dies_is_named() -> None:
    with (
        gradwire.local(stage_servers=1, parameter_servers=1) as cluster,
        with_servers(cluster, stages=1, replicas=1, cuts=None, parameter_servers=1) as trainer,
    ):
        results = trainer.run([make_batch(1)], steps=100_000, progress=False)
        next(results)
        os.kill(cluster.process_ids[-1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(gradwire.GradwireError, match="arameter server 0"):
            for _ in results:
                pass
        assert time.monotonic() - began < 10
