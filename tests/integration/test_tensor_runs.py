"""Tensor-parallel servers as a script sees them: results, weights and checkpoints are whole, whoever has which part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from gradwire_protocol.v1 import coordinator_pb2

SHAPE = Shape(layers=2, width=16, heads=4, context=8)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    with gradwire.local(stage_servers=4, checkpoint_root=tmp_path_factory.mktemp("checkpoints")) as made:
        yield made


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return GPT(SHAPE).double()


def make_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(256, (8, SHAPE.context + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def train(cluster: gradwire.Cluster, model: nn.Module | None = None, **fields: Any) -> gradwire.Trainer:
    model = model or make_model()
    return cluster.trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss=next_byte_loss,
        example=make_batch(),
        plan=gradwire.Plan(**{"tensor": 2, "microbatches": 4, "schedule": "1f1b", **fields}),
    )


@pytest.mark.parametrize(
    ("fields", "plan"), [({"stages": 2}, "gpt"), ({"replicas": 2}, "auto"), ({"tensor": 4}, "gpt")]
)
def test_a_step_equals_one_process(cluster: gradwire.Cluster, fields: dict[str, Any], plan: str) -> None:
    found = gradwire.verify(
        cluster,
        make_model(),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss=next_byte_loss,
        batch=make_batch(),
        plan=gradwire.Plan(**{"tensor": 2, "microbatches": 4, "tensor_plan": plan, **fields}),
        max_grad_norm=0.05,
    )
    assert found.equal, str(found)


def test_what_comes_back_is_whole(cluster: gradwire.Cluster) -> None:
    """The vocabulary is split too, so that each server has a part of the scores."""
    model = make_model()
    x, y = make_batch(1)
    with train(cluster, model, stages=2, tensor_plan="gpt") as trainer:
        trainer.step(*make_batch())
        _, gradients = trainer.step_with_gradients(*make_batch())
        state = trainer.state_dict()
        predicted, loss = trainer.predict(x), trainer.evaluate([(x, y)])
        assert len(trainer.servers) == 4
        tensor = trainer.plan.tensor
        assert tensor is not None
        assert (tensor.servers, trainer.plan.shards, trainer.plan.servers_each) == (2, 2, 4)
        assert {(item.name, item.split) for item in tensor.parameters} >= {
            ("embedding.weight", "vocab"),
            ("blocks.1.attention.qkv.bias", "column"),
            ("blocks.1.mlp.2.weight", "row"),
        }
        trainer.step(*make_batch())
        assert [server.shard for server in trainer.report(steps=1).servers] == [0, 1, 0, 1]
        assert _shards(cluster.status(), trainer) == {0, 1}
        assert not trainer.replan(minimum_gain=0.99).moved
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in gradients.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(predicted, model(x), rtol=1e-10, atol=1e-12)
        assert loss == pytest.approx(next_byte_loss(model(x), y).item(), rel=1e-10)


def _shards(reply: coordinator_pb2.GetStatusReply, trainer: gradwire.Trainer) -> set[int]:
    return {server.shard for run in reply.runs if run.run == trainer.run_id for server in run.plan.prediction.servers}


@pytest.mark.parametrize("storage", ["client", "server"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_checkpoint_is_for_any_number_of_servers_a_stage(
    cluster: gradwire.Cluster, tmp_path: Path, storage: Any, before: int, after: int
) -> None:
    path = tmp_path / "saved" if storage == "client" else Path(f"saved-{before}-{after}")
    with train(cluster, tensor=before, tensor_plan="gpt") as trainer:
        trainer.step(*make_batch(0))
        trainer.save(path, storage=storage)
        trainer.step(*make_batch(1))
        wanted = trainer.state_dict()
    with train(cluster, tensor=after) as trainer:
        trainer.load(path, storage=storage)
        trainer.step(*make_batch(1))
        found = trainer.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_what_replicas_owe_is_left_where_each_has_parts(cluster: gradwire.Cluster, tmp_path: Path) -> None:
    with train(cluster, tensor=1, replicas=2, compression="topk(density=0.1)") as trainer:
        trainer.step(*make_batch(0))
        trainer.save(tmp_path / "saved")
        wanted = trainer.state_dict()
    with train(cluster, replicas=2, compression="topk(density=0.1)") as trainer:
        trainer.load(tmp_path / "saved")
        found = trainer.state_dict()
        trainer.step(*make_batch(1))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class Feed(nn.Module):
    """A model that says itself how the first of its two pairs is split."""

    def __init__(self) -> None:
        super().__init__()
        self.column, self.row = gradwire.ColumnParallelLinear(6, 8), gradwire.RowParallelLinear(8, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.row(F.gelu(self.column(x)))
        result: torch.Tensor = x + self.down(F.gelu(self.up(x)))
        return result


def test_layers_that_say_how_they_are_split(cluster: gradwire.Cluster) -> None:
    torch.manual_seed(0)
    model, batch = Feed(), (torch.randn(8, 6), torch.randn(8, 6))
    plan = gradwire.Plan(tensor=2, microbatches=2)
    arguments: dict[str, Any] = {"loss": F.mse_loss, "plan": plan}
    planned = cluster.plan(model, torch.optim.SGD(model.parameters(), lr=0.1), example=batch, **arguments)
    assert planned.tensor is not None
    splits = {item.name: item.split for item in planned.tensor.parameters}
    # The other pair is found.
    assert splits == {
        **{f"{name}.{kind}": "column" for name in ("column", "up") for kind in ("weight", "bias")},
        "row.weight": "row",
        "down.weight": "row",
    }
    make = lambda made: torch.optim.SGD(made.parameters(), lr=0.1)  # noqa: E731
    found = gradwire.verify(cluster, model, make, batch=batch, double=True, **arguments)
    assert found.equal, str(found)
