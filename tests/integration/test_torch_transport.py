"""Sums by gloo in place of messages: the same results, and whoever is missing in one is named."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_processes import failure, process_of, wait_until_free
from replica_subject import (
    check_first_step,
    check_replicas_are_one,
    check_weights,
    make_batch,
    make_optimizer,
    one_process,
    train,
)
from torch import nn

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss

pytestmark = pytest.mark.model

SHAPE = Shape(layers=2, width=16, heads=4, context=6)


@pytest.fixture(scope="module")
def cluster() -> Iterator[gradwire.LocalCluster]:
    with gradwire.local(stage_servers=4, parameter_servers=1) as made:
        yield made


@pytest.mark.parametrize(
    "fields",
    [
        {"zero": "off"},
        {"zero": "on"},
        {"zero": "on", "stages": 1, "cuts": None, "replicas": 4},
        {"stages": 1, "cuts": None, "replicas": 3},
        # One replica has more of them than the other; the last batch has none for it.
        {"stages": 1, "cuts": None, "microbatches": 5},
        {"zero": "on", "microbatches": 3},
        {"stages": 2, "schedule": "zb-h1", "zero": "off"},
    ],
    ids=str,
)
def test_replicas_train_as_one_process_does(cluster: gradwire.Cluster, tmp_path: Path, fields: dict[str, Any]) -> None:
    with train(cluster, transport="gloo", **{"microbatches": 4, **fields}) as trainer:
        assert (trainer.plan.transport, trainer.plan.transport_reason) == ("gloo", "the plan asks for it")
        assert trainer.plan.shards_optimizer == (fields.get("zero") == "on")
        check_first_step(trainer)
        trainer.step(*make_batch(1))
        check_weights(trainer.state_dict(), one_process(2))
        if trainer.plan.micro_batches % trainer.plan.replicas == 0 and trainer.plan.replicas == 2:
            check_replicas_are_one(trainer)
        trainer.save(tmp_path / "a")
        trainer.load(tmp_path / "a")
        trainer.step(*make_batch(2))
        check_weights(trainer.state_dict(), one_process(3))


def test_with_few_rows_a_replica_has_nothing_to_add(cluster: gradwire.Cluster) -> None:
    x, y = make_batch(0, rows=1)
    with train(cluster, transport="gloo", microbatches=2) as trainer:
        _, gradients = trainer.step_with_gradients(x, y)
        model = one_process(0)
        F.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-10)
        assert "gloo adds up the whole" in trainer.plan.zero_reason


def test_many_buckets_are_on_their_way(cluster: gradwire.Cluster) -> None:
    """Of 4 MiB each, and one that is made in parts."""

    def states(transport: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 700), *(nn.Linear(700, 700) for _ in range(6)), nn.Linear(700, 3100), nn.Linear(3100, 3)]
        model = nn.Sequential(*layers).double()
        with train(cluster, "SGD", model=model, transport=transport, stages=1, cuts=None, zero="off") as trainer:
            for seed in range(2):
                trainer.step(*make_batch(seed))
            check_replicas_are_one(trainer)
            return trainer.state_dict()

    found, expected = states("gloo"), states("grpc")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("codec", ["int8", "powersgd(rank=2)"])
def test_what_a_codec_encodes_goes_as_messages(cluster: gradwire.Cluster, codec: str) -> None:
    states = []
    for transport in ("grpc", "gloo"):
        with train(cluster, compression=codec, transport=transport) as trainer:
            for seed in range(3):
                trainer.step(*make_batch(seed))
            states.append(trainer.state_dict())
            assert trainer.plan.transport == "grpc"
    assert f"{codec} encodes what replicas exchange" in trainer.plan.transport_reason
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_local_steps_agree_by_it(cluster: gradwire.Cluster) -> None:
    states = []
    for transport in ("grpc", "gloo"):
        with train(cluster, exchange="local", every=2, transport=transport) as trainer:
            for seed in range(4):
                trainer.step(*make_batch(seed))
            check_replicas_are_one(trainer)
            states.append(trainer.state_dict())
            assert trainer.plan.transport == transport
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=0, atol=1e-10)


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(SHAPE).double()


def text(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(256, (8, SHAPE.context + 1), generator=torch.Generator().manual_seed(seed))
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


@pytest.mark.parametrize(
    "fields", [{"stages": 2}, {"replicas": 2}, {"replicas": 2, "zero": "on"}, {"tensor": 4}], ids=str
)
def test_a_step_of_shards_equals_one_process(cluster: gradwire.Cluster, fields: dict[str, Any]) -> None:
    found = gradwire.verify(
        cluster,
        gpt(),
        make_optimizer,
        loss=next_byte_loss,
        batch=text(),
        plan=gradwire.Plan(**{"tensor": 2, "microbatches": 4, "transport": "gloo", **fields}),
        max_grad_norm=0.05,
    )
    assert found.equal, str(found)


def test_what_cannot_be_is_refused_before_the_run(cluster: gradwire.Cluster) -> None:
    with pytest.raises(gradwire.PlanError, match="for servers on cuda devices"):
        train(cluster, transport="nccl")
    with pytest.raises(gradwire.PlanError, match="goes as messages") as caught:
        train(cluster, transport="gloo", exchange="parameter-server")
    assert "leave transport out" in (caught.value.remedy or "")
    with train(cluster, exchange="parameter-server", stages=1, cuts=None) as trainer:
        assert trainer.plan.transport == "grpc"


def replicas(cluster: gradwire.Cluster, **fields: Any) -> gradwire.Trainer:
    return train(cluster, transport="gloo", stages=1, cuts=None, **fields)


def shards(cluster: gradwire.Cluster, **fields: Any) -> gradwire.Trainer:
    model = gpt()
    plan = gradwire.Plan(tensor=2, microbatches=4, transport="gloo", **fields)
    return cluster.trainer(model, make_optimizer(model), loss=next_byte_loss, example=text(), plan=plan)


@pytest.mark.parametrize(("start", "batch"), [(replicas, make_batch(0)), (shards, text())], ids=["replicas", "shards"])
def test_one_that_stands_still_or_dies_is_named(start: Callable[..., gradwire.Trainer], batch: Any) -> None:
    with gradwire.local(stage_servers=2, threads=1) as cluster:
        with start(cluster, stall_seconds=2.0) as trainer:
            victim = trainer.servers[1]
            frozen = process_of(cluster, victim)
            try:
                error = failure(trainer, batch, frozen.suspend)
                # Nobody has to wait for it.
                wait_until_free(cluster, but=victim)
            finally:
                frozen.resume()
            assert isinstance(error, gradwire.Stalled)
            assert victim in error.message
        wait_until_free(cluster)
        # Those who were left in an exchange are good for another run.
        with start(cluster) as trainer:
            victim = trainer.servers[1]
            error = failure(trainer, batch, lambda: os.kill(process_of(cluster, victim).pid, signal.SIGKILL))
            assert isinstance(error, gradwire.StageFailed)
            assert victim in error.message
        wait_until_free(cluster)


def test_one_that_fails_by_itself_is_named(cluster: gradwire.LocalCluster) -> None:
    """Its connections break, and the others have errors of their own from that."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3))
    words, y = torch.arange(8), torch.zeros(8, 3)
    plan = gradwire.Plan(replicas=2, microbatches=2, transport="gloo")
    with cluster.trainer(model, make_optimizer(model), loss=F.mse_loss, example=(words, y), plan=plan) as trainer:
        trainer.step(words, y)
        with pytest.raises(gradwire.ModelError, match="index out of range") as caught:
            # The second replica has the last rows.
            trainer.step(words + torch.tensor([0] * 7 + [99]), y)
        assert trainer.servers[1] in caught.value.message
    wait_until_free(cluster)
