"""Training under autocast, and with forwards that run again, on a cluster: against one process, and each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from torch import nn

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from gradwire_protocol.v1 import run_pb2, tensors_pb2
from gradwire_stage.group.tensor_group import Shards
from gradwire_stage.recomputation import Inputs
from gradwire_stage.segment import BuiltSegment, SegmentPass

BF16 = torch.bfloat16
ROWS = (8, 7)
MICRO_BATCHES = 3


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Conv2d(1, 8, 3, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x + F.relu(norm(convolution(x)))
        return self.head(x.mean((2, 3)))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.dropout(torch.tanh(layer(x)), 0.3, self.training)
        return self.norm(x)


def make(kind: str) -> tuple[nn.Module, Any, list[Any]]:
    torch.manual_seed(2)
    if kind == "gpt":
        text = [torch.randint(0, 256, (rows, 17)) for rows in ROWS]
        batches = [(item[:, :-1].contiguous(), item[:, 1:].contiguous()) for item in text]
        return GPT(Shape(layers=2, width=32, heads=2, context=16)), next_byte_loss, batches
    if kind == "conv":
        batches = [(torch.randn(rows, 1, 6, 6), torch.randint(0, 4, (rows,))) for rows in ROWS]
        return ConvNet(), F.cross_entropy, batches
    return Dropping(), F.mse_loss, [(torch.randn(rows, 8), torch.randn(rows, 8)) for rows in ROWS]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gradwire.Cluster]:
    with cluster_in_process(tmp_path_factory.mktemp("cluster"), stage_servers=3) as cluster:
        yield cluster


def train(
    cluster: gradwire.Cluster, kind: str, plan: gradwire.Plan, *, double: bool = False, precision: str | None = None
) -> tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor], float, torch.Tensor]:
    """Return losses, gradients, state, the loss in evaluation, and a prediction."""
    model, loss, batches = make(kind)
    if double:
        model = model.double()
        batches = [tuple(t.double() if t.is_floating_point() else t for t in batch) for batch in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, gradients = [], []
    with cluster.trainer(model, optimizer, loss=loss, example=batches[0], plan=plan, precision=precision) as trainer:
        for batch in batches:
            result, made = trainer.step_with_gradients(*batch)
            losses.append(result.loss)
            gradients.append(made)
        return losses, gradients, trainer.state_dict(), trainer.evaluate(batches), trainer.predict(batches[0][0])


def one_process(kind: str) -> tuple[list[float], list[dict[str, torch.Tensor]], dict[str, torch.Tensor], float]:
    """The same under autocast, written out: the loss of each micro-batch counts by what it is a mean of."""
    model, loss, batches = make(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, gradients = [], []
    for x, y in batches:
        optimizer.zero_grad()
        total = 0.0
        for part_x, part_y in zip(x.tensor_split(MICRO_BATCHES), y.tensor_split(MICRO_BATCHES), strict=True):
            with torch.autocast("cpu", BF16):
                value = loss(model(part_x), part_y)
            (value * part_y.numel()).backward()
            total += value.item() * part_y.numel() / y.numel()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= y.numel()
        losses.append(total)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        evaluated = [loss(model(x), y).item() * len(x) for x, y in batches]
    return losses, gradients, model.state_dict(), sum(evaluated) / sum(ROWS)


def close(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-3)
        difference = float((made[name] - tensor).abs().max())
        assert difference <= tolerance * scale, f"{name} is off by {difference} of {scale}"


@pytest.mark.parametrize(("kind", "stages"), [("gpt", 1), ("gpt", 2), ("gpt", 3), ("conv", 2), ("conv", 3)])
def test_autocast_equals_one_process(cluster: gradwire.Cluster, kind: str, stages: int) -> None:
    plan = gradwire.Plan(stages=stages, microbatches=MICRO_BATCHES)
    losses, gradients, state, evaluated, predicted = train(cluster, kind, plan, precision="bf16")
    expected = one_process(kind)
    # The first step is the same but for the order of sums in float32; behind it, bfloat16 makes more of that.
    assert losses[0] == pytest.approx(expected[0][0], rel=1e-6)
    close(gradients[0], expected[1][0], 1e-6)
    assert losses[1] == pytest.approx(expected[0][1], rel=1e-3)
    close(gradients[1], expected[1][1], 2e-2)
    assert evaluated == pytest.approx(expected[3], rel=1e-3)
    assert predicted.dtype == BF16
    floating = {tensor.dtype for tensor in (*state.values(), *gradients[0].values()) if tensor.is_floating_point()}
    assert floating == {torch.float32}
    close({k: v.float() for k, v in state.items()}, {k: v.float() for k, v in expected[2].items()}, 2e-2)


@pytest.mark.parametrize("kind", ["gpt", "conv"])
def test_the_comparison_with_one_process_knows_autocast(cluster: gradwire.Cluster, kind: str) -> None:
    model, loss, batches = make(kind)
    found = gradwire.verify(
        cluster,
        model,
        lambda made: torch.optim.AdamW(made.parameters()),
        loss=loss,
        batch=batches[1],
        plan=gradwire.Plan(stages=2, microbatches=2, recompute=True),
        max_grad_norm=1.0,
        precision="bf16",
    )
    assert found.equal, str(found)
    assert found.gradient_difference < 1e-3
    assert "float32 under bfloat16 autocast" in str(found)


def test_fp16_is_refused_with_its_reason(cluster: gradwire.Cluster) -> None:
    model, loss, batches = make("conv")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gradwire.PlanError, match=r"unless the loss is scaled.*bf16"):
        cluster.trainer(model, optimizer, loss=loss, example=batches[0], precision="fp16")


# With three stages and three micro-batches: how many forwards are run again in a step. Where a backward follows its
# forward directly, as on the last stage of 1F1B, none is.
@pytest.mark.parametrize(("schedule", "repeated"), [("gpipe", 9), ("1f1b", 6), ("auto", 6)])
@pytest.mark.parametrize("kind", ["gpt", "conv"])
def test_recomputation_changes_nothing(
    cluster: gradwire.Cluster, kind: str, schedule: str, repeated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    again = BuiltSegment.again

    def counted(segment: BuiltSegment, inputs: Inputs, group: Shards | None) -> SegmentPass:
        calls.append(inputs.micro_batch)
        return again(segment, inputs, group)

    monkeypatch.setattr(BuiltSegment, "again", counted)
    made = [
        train(
            cluster,
            kind,
            gradwire.Plan(stages=3, microbatches=MICRO_BATCHES, schedule=schedule, recompute=recompute),
            double=True,
        )
        for recompute in (False, True)
    ]
    assert made[1][0] == made[0][0]
    for repeat, kept in zip((*made[1][1], made[1][2]), (*made[0][1], made[0][2]), strict=True):
        assert repeat.keys() == kept.keys()
        assert all(torch.equal(repeat[name], kept[name]) for name in kept)
    assert len(calls) == len(ROWS) * repeated
    assert made[1][3] == made[0][3]
    assert torch.equal(made[1][4], made[0][4])


def test_recomputation_draws_the_same_random_numbers(four_processes: gradwire.Cluster) -> None:
    """On servers in processes of their own: torch's generator is one a process."""
    plans = [
        gradwire.Plan(stages=2, microbatches=3, schedule="gpipe", recompute=recompute) for recompute in (False, True)
    ]
    kept, again = (train(four_processes, "dropping", plan, double=True) for plan in plans)
    assert again[0] == kept[0]
    assert all(torch.equal(again[2][name], kept[2][name]) for name in kept[2])


def test_the_plan_counts_recomputation(cluster: gradwire.Cluster) -> None:
    model, loss, batches = make("gpt")
    seconds = []
    for recompute in (False, True):
        plan = gradwire.Plan(stages=3, microbatches=4, schedule="1f1b", cuts=[15, 28], recompute=recompute)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with cluster.trainer(model, optimizer, loss=loss, example=batches[0], plan=plan) as trainer:
            seconds.append([stage.estimated_seconds for stage in trainer.plan.stages])
    ratios = [again / kept for kept, again in zip(*seconds, strict=True)]
    assert ratios[:2] == [pytest.approx(4 / 3, rel=0.1)] * 2
    assert ratios[2] == pytest.approx(1.0)  # its backwards follow their forwards directly


def test_what_travels_has_its_own_type(cluster: gradwire.Cluster) -> None:
    """The planner counts bytes in the types of the run: a boundary inside of a layer is half as large."""
    model, loss, batches = make("gpt")
    sent = []
    for precision in (None, "bf16"):
        # Before the activation between the two matrices of a block's MLP.
        plan = gradwire.Plan(stages=2, microbatches=4, cuts=["blocks.0.mlp.1"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with cluster.trainer(
            model, optimizer, loss=loss, example=batches[0], plan=plan, precision=precision
        ) as trainer:
            sent.append(trainer.plan.stages[0].boundary_bytes)
    assert sent[1] < 0.75 * sent[0]


def test_the_plans_message() -> None:
    plan = gradwire.Plan(recompute=True)
    message = plan.to_proto(rows=4, cut_before=lambda path: 1, precision=tensors_pb2.DATA_TYPE_BFLOAT16)
    assert isinstance(message, run_pb2.Plan)
    assert (message.recompute, message.precision) == (True, tensors_pb2.DATA_TYPE_BFLOAT16)
