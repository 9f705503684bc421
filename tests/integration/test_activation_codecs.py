"""Activations and their gradients under codecs: every server has the same values, and training still learns."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_cluster import Cluster, wait_until
from stage_model import Reference
from torch import nn
from torch.nn.functional import linear, mse_loss

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from gradwire_protocol.codecs import CODEC_NAMES
from gradwire_protocol.errors import FrameError, PlanError
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.codecs.registry import Encoded, encode

NONE, INT8 = pb.CODEC_NONE, pb.CODEC_INT8
THREE = {"A": [0], "B": [1], "C": [2]}


def rounded(tensor: torch.Tensor, codec: int) -> torch.Tensor:
    return Encoded(codec, tensor.dtype, tuple(tensor.shape), ()).decode(encode(codec, tensor.contiguous()))


class Travels(torch.autograd.Function):
    """A value that travels under one codec, and its gradient, that travels back under another."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, there: int, back: int) -> torch.Tensor:
        context.back = back
        return rounded(value, there)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return rounded(gradients[0], context.back), None, None


def reference_gradients(first: int, second: int, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of one step, with every value and gradient as it is where it is used."""
    model = Reference()
    travels: Any = Travels.apply
    h = torch.tanh(linear(x, model.w, model.a))
    h1 = travels(h, first, first)  # to stage 1; the gradient of both readers comes back from there
    g = torch.tanh(linear(h1, model.w, model.b))
    # To stage 2 the value goes straight from stage 0, the gradient by way of stage 1.
    h2 = travels(h1 + (h - h1).detach(), second, second)
    g2 = travels(g, second, second)
    # Gradients are sums on their way, and divided in the end: that decides how they are rounded.
    (mse_loss(linear(g2 + h2, model.v) * model.scale, y) * len(x)).backward()
    return {name: parameter.grad / len(x) for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("first", "second"), [(INT8, INT8), (pb.CODEC_BF16, INT8), (NONE, pb.CODEC_FP16)])
def test_every_value_and_gradient_travels_under_the_codec_of_its_reader(first: pb.Codec, second: pb.Codec) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(9, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    with Cluster(THREE) as cluster:
        cluster.codecs = (first, second)
        cluster.open()
        entry = cluster.submit_step(x, y, 1, return_gradients=True)
        cluster.reports()
        gradients = {key.value: tensor for key, tensor in cluster.collect(entry)}
        expected = reference_gradients(first, second, x, y)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)
        # 36 elements; what left each server for another, and what came.
        size = {NONE: 288, pb.CODEC_BF16: 72, pb.CODEC_FP16: 72, INT8: 40}
        name_of = {codec: name for name, codec in CODEC_NAMES.items()}

        def moved(server: str, peer: str, direction: str, kind: str, codec: int) -> float | None:
            labels = {"run": "r", "peer": peer, "direction": direction, "kind": kind, "codec": name_of[codec]}
            return cluster.servers[server].metric("gradwire_transfer_bytes_total", **labels)

        wait_until(lambda: moved("A", "B", "sent", "forward", first) == size[first])
        wait_until(lambda: moved("A", "C", "sent", "forward", second) == size[second])
        assert moved("C", "A", "received", "forward", second) == size[second]
        assert moved("B", "C", "received", "backward", second) == 2 * size[second]
        assert moved("A", "B", "received", "backward", first) == size[first]


def test_a_server_with_several_readers_gets_one_message_and_its_own_values_untouched() -> None:
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with Cluster({"A": [0], "B": [1, 2]}) as cluster:
        cluster.codecs = (INT8, NONE)
        cluster.open()
        entry = cluster.submit_forward("predict", x, None, 1)
        cluster.reports()
        ((_, out),) = list(cluster.collect(entry))
        model = Reference()
        with torch.no_grad():
            h = rounded(torch.tanh(linear(x, model.w, model.a)), INT8)
            expected = linear(torch.tanh(linear(h, model.w, model.b)) + h, model.v) * model.scale
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_wrong_codecs_are_refused_when_a_run_is_prepared() -> None:
    with Cluster(THREE) as cluster:
        for codecs in ((INT8,), (INT8, INT8, INT8), (NONE, pb.CODEC_UNSPECIFIED)):
            cluster.codecs = codecs
            with pytest.raises(FrameError, match="codecs"):
                cluster.prepare()


# --- a whole cluster


CONTEXT = 32


@pytest.fixture(scope="module")
def cluster(four_processes: gradwire.Cluster) -> gradwire.Cluster:
    return four_processes


@functools.cache
def small_gpt(precision: str | None) -> GPT:
    """The same for all runs in a precision, which leave it as it is."""
    torch.manual_seed(0)
    return GPT(Shape(layers=2, width=64, heads=4, context=CONTEXT))


def text_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(text) - CONTEXT - 1, (count, 16), generator=generator)
    rows = torch.stack(
        [torch.stack([text[start : start + CONTEXT + 1] for start in batch]) for batch in starts.tolist()]
    )
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in rows]


def train(
    cluster: gradwire.Cluster, codec: Any, steps: int, precision: str | None = None
) -> tuple[list[float], Any, float]:
    """Train a small GPT on text; return its losses, the plan as carried out, and the loss on text not trained on."""
    model = small_gpt(precision)
    batches = text_batches(steps + 2)
    with cluster.trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss=next_byte_loss,
        example=batches[0],
        plan=gradwire.Plan(stages=2, microbatches=4, cuts=["blocks.1"], activation_compression=codec),
        precision=precision,
        max_grad_norm=1.0,
    ) as trainer:
        losses = [result.loss for result in trainer.run(batches[:steps], progress=False)]
        return losses, trainer.plan, trainer.evaluate(batches[steps:])


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_training_learns_as_well_as_without(cluster: gradwire.Cluster, precision: str | None) -> None:
    found = {}
    for codec in ("none", "bf16", "fp16", "int8"):
        losses, plan, held_out = train(cluster, codec, 24, precision)
        assert plan.stages[0].codec == codec
        assert losses[-1] < losses[0] - 2
        found[codec] = held_out
    assert found["int8"] != found["none"]
    for codec, held_out in found.items():
        assert held_out == pytest.approx(found["none"], rel=0.02), codec


def test_the_plan_counts_what_travels_as_encoded(cluster: gradwire.Cluster) -> None:
    sizes = []
    for codec in ("none", "fp16", "int8"):
        _, plan, _ = train(cluster, [codec], 1)
        sizes.append(plan.stages[0].boundary_bytes)
        assert plan.stages[0].codec_reason == ""
        assert plan.stages[1].codec == "none"
    elements = 16 * CONTEXT * 64
    assert sizes == [4 * elements, 2 * elements, elements + 4 * elements // 256]


class Masked(nn.Module):
    """Attention with a mask, and tables of positions, that are made before the first layer and read behind the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = x.shape[1]
        mask = torch.full((places, places), -torch.inf).triu(1)
        table = torch.sin(torch.arange(places, dtype=torch.float32)[:, None] * 0.1 + torch.arange(32) * 0.01)
        for layer in self.layers:
            x = torch.tanh(layer(x + table))
            x = torch.softmax(x @ x.transpose(1, 2) + mask, -1) @ x
        return x


def test_masks_and_tables_travel_as_they_are(cluster: gradwire.Cluster) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 12, 32), torch.randn(8, 12, 32)
    losses, sent = {}, {}
    for codec in ("none", "int8"):
        torch.manual_seed(0)
        model = Masked()
        with cluster.trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss=mse_loss,
            example=(x, y),
            plan=gradwire.Plan(stages=2, microbatches=2, cuts=["layers.2"], activation_compression=codec),
        ) as trainer:
            losses[codec] = [trainer.step(x, y).loss for _ in range(3)]
            sent[codec] = trainer.plan.stages[0].boundary_bytes
    assert losses["int8"] == pytest.approx(losses["none"], rel=1e-3)
    assert losses["int8"] != losses["none"]
    # Two micro-batches with the mask, the table and 4 × 12 × 32 elements: only these became smaller.
    elements = 4 * 12 * 32
    assert sent["none"] - sent["int8"] == 2 * (4 * elements - elements - 4 * elements // 256)


def test_auto_takes_none_where_the_link_is_no_hindrance_and_says_why(cluster: gradwire.Cluster) -> None:
    _, plan, _ = train(cluster, "auto", 1)
    assert plan.stages[0].codec in ("none", "bf16", "int8")
    assert "Mbit/s forward" in plan.stages[0].codec_reason
    assert "estimate of a step: none" in plan.stages[0].codec_reason
    assert plan.stages[1].codec_reason == ""


def test_equality_with_one_process_is_not_claimed_for_a_lossy_plan(cluster: gradwire.Cluster) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    batch = (torch.randn(4, 4), torch.randn(4, 4))
    for codec in ("int8", "auto", ["fp16"]):
        with pytest.raises(PlanError, match="no cluster equals one process"):
            gradwire.verify(
                cluster,
                model,
                lambda made: torch.optim.SGD(made.parameters(), lr=0.1),
                loss=mse_loss,
                batch=batch,
                plan=gradwire.Plan(stages=2, activation_compression=codec),
            )
