"""Segments under autocast equal one process under autocast, wherever they are cut (T13)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_driver import Chain, assert_equal, eager
from graph_models import GPT, Encoder, Regions, ResidualNet, squared_loss, token_loss
from torch import nn

from gradwire.graph import ExportedModel, export_model
from gradwire.graph.precision import autocast, precision_type
from gradwire_protocol.errors import PlanError
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import graph_pb2

BF16 = torch.bfloat16
# Sums are divided once, and what a parameter gets from several uses is added in another order: rounding of float32.
TOLERANCE = 1e-6
# Against a process that scales the loss otherwise (the mean of a batch, where the sum is taken here) every value of the
# backward pass is rounded to bfloat16 elsewhere: its epsilon is 8e-3 (measured: 8e-3 of each tensor's largest).
SCALED_TOLERANCE = 2e-2
MICRO_BATCH_ROWS = (3, 2, 2)


class Typed(nn.Module):
    """Code that reads the type of a value, as root-mean-square norms do: it must see the type of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + self.second(scaled.to(x.dtype)) * x


class Branches(nn.Module):
    """A value in float32 that several operators cast: each for itself, as it is not a leaf in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x).float())
        return sum((branch(x) for branch in self.branches), torch.zeros(()))


class Shared(nn.Module):
    """One module, used on both sides of every cut but one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.linear(torch.tanh(self.linear(x)))))


def rows_of_six(rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 6), torch.randn(rows, 6)


def make(kind: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    if kind == "gpt":
        return GPT(), token_loss, (torch.randint(0, 11, (7, 6)), torch.randint(0, 11, (7, 6)))
    if kind == "encoder":
        return Encoder(), F.cross_entropy, (torch.randn(7, 4, 8), torch.randint(0, 3, (7,)))
    if kind == "residual":
        return ResidualNet(), F.cross_entropy, (torch.randn(7, 1, 5, 5), torch.randint(0, 3, (7,)))
    model = (
        {"typed": Typed, "branches": Branches, "shared": Shared}[kind]()
        if kind != "regions"
        else Regions(autocast=True)
    )
    return model, squared_loss, rows_of_six()


def export(kind: str) -> tuple[ExportedModel, nn.Module, Any, Any]:
    model, loss, batch = make(kind)
    return export_model(model, loss, batch, precision=BF16), model, loss, batch


@pytest.mark.parametrize("kind", ["gpt", "encoder", "residual", "typed", "branches", "regions"])
def test_one_two_and_three_stages_equal_one_process(kind: str) -> None:
    exported, model, loss, batch = export(kind)
    # The weight of the loss: tokens, or rows.
    weights = [rows * (6.0 if kind == "gpt" else 1.0) for rows in MICRO_BATCH_ROWS]
    expected = eager(model, loss, batch, micro_batches=3, weights=weights, precision=BF16)
    allowed = list(exported.proto.train.allowed_cuts)
    chosen = random.Random(0)
    two_stages = [[cut] for cut in allowed] if kind == "branches" else []
    for cuts in (*(sorted(chosen.sample(allowed, stages - 1)) for stages in (1, 2, 2, 3, 3)), *two_stages):
        got = Chain(exported, cuts, precision=BF16).train(batch, micro_batches=3)
        assert_equal(got, expected, TOLERANCE)
        assert {gradient.dtype for gradient in got.gradients.values()} == {torch.float32}


def test_it_is_not_what_float32_gives() -> None:
    exported, model, loss, batch = export("gpt")
    got = Chain(exported, [], precision=BF16).train(batch)
    single = eager(model, loss, batch)
    assert abs(got.loss - single.loss) > 1e-5
    assert_equal(got, eager(model, loss, batch, precision=BF16), SCALED_TOLERANCE)


def test_a_parameter_of_two_stages_differs_by_less_than_bfloat16_rounds() -> None:
    """One process casts it once, and adds the gradients of its uses in bfloat16; here they are added in float32."""
    exported, model, loss, batch = export("shared")
    expected = eager(model, loss, batch, precision=BF16)
    assert_equal(Chain(exported, [], precision=BF16).train(batch), expected, TOLERANCE)
    for cut in exported.proto.train.allowed_cuts:
        assert_equal(Chain(exported, [cut], precision=BF16).train(batch), expected, 2**-7)


@pytest.mark.parametrize("kind", ["gpt", "residual", "regions"])
def test_values_travel_in_the_type_that_the_graph_says(kind: str) -> None:
    exported, _, _, batch = export(kind)
    types = set()
    for cut in exported.proto.train.allowed_cuts:
        chain = Chain(exported, [cut], precision=BF16)
        first, _ = chain.segments[graph_pb2.GRAPH_KIND_TRAIN]
        values = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN).values
        made = chain.built(first).forward(values, step=1, micro_batch=0, record=True)
        said = {node.name: node.output for node in first.nodes}
        for name, value in made.outgoing.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == TORCH_TYPES[said[name].data_type], name
                types.add(value.dtype)
    assert BF16 in types


def test_evaluation_and_prediction_run_under_autocast_too() -> None:
    exported, model, loss, batch = export("encoder")
    chain = Chain(exported, [exported.cut_before("encoder.layers.1")], precision=BF16)
    model.eval()
    with torch.autocast("cpu", BF16):  # recording: otherwise torch's encoder takes a faster path
        output = model(batch[0])
        expected = float(loss(output, batch[1]).detach())
    assert chain.evaluate(batch) == pytest.approx(expected, rel=TOLERANCE)
    predicted = chain.predict(batch[:1])
    assert predicted.dtype == BF16
    assert torch.equal(predicted, output)


def test_no_cast_outlives_its_pass() -> None:
    exported, model, loss, batch = export("encoder")
    chain = Chain(exported, [], precision=BF16)
    chain.train(batch)
    assert not torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1
            chain.stores[0][name].copy_(parameter)
            chain.stores[0][name].grad = None
    assert_equal(chain.train(batch), eager(model, loss, batch, precision=BF16), TOLERANCE)


def test_precisions() -> None:
    model = nn.Linear(2, 2)
    assert precision_type(None, model) is None
    assert precision_type("bf16", model) is BF16
    with pytest.raises(PlanError, match=r"all servers together.*precision=\"bf16\""):
        precision_type("fp16", model)
    for wrong in ("fp8", 16, torch.bfloat16):
        with pytest.raises(PlanError, match="precision is not valid"):
            precision_type(wrong, model)
    with pytest.raises(PlanError, match=r"change nothing.*float64"):
        precision_type("bf16", nn.Linear(2, 2).double())


def test_without_a_precision_the_callers_autocast_does_not_count() -> None:
    model, loss, batch = make("encoder")
    with torch.autocast("cpu", BF16):
        exported = export_model(model, loss, batch)
        with autocast(None, model):
            assert not torch.is_autocast_enabled("cpu")
    assert BF16 not in {TORCH_TYPES.get(node.output.data_type) for node in exported.proto.train.nodes}
