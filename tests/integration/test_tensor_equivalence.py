"""Stages of several servers each train as one process does: losses, every gradient, every weight, within 1e-10.

And what servers have the whole of is the same at all of them, bit for bit; and if one of them goes, it is named.
"""

from __future__ import annotations

import copy
import functools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cluster_in_process import cluster_in_process
from cluster_processes import failure, process_of, wait_until_free
from torch import nn

import gradwire
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from gradwire_stage.group.tensor_group import TensorGroup
from gradwire_stage.service import StageService

pytestmark = pytest.mark.model

SHAPE = Shape(layers=2, width=16, heads=4, context=6)
WORDS, LENGTH = 20, 6
# The second does not divide into three micro-batches.
ROWS = (9, 7)
NORM = 0.3


class Scores(nn.Module):
    """One of Hugging Face's causal models, without its loss, which is in float32."""

    def __init__(self, name: str, **settings: Any) -> None:
        import transformers

        super().__init__()
        kind, of = ("GPT2LMHeadModel", "GPT2Config") if name == "GPT2" else ("LlamaForCausalLM", "LlamaConfig")
        config = getattr(transformers, of)(vocab_size=WORDS, use_cache=False, **settings)
        self.inner = getattr(transformers, kind)(config)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(input_ids=words).logits
        return scores


def gpt() -> nn.Module:
    return GPT(SHAPE)


def gpt2() -> nn.Module:
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return Scores("GPT2", n_positions=LENGTH, n_embd=16, n_layer=2, n_head=4, **dropouts)


class Norm(nn.Module):
    """Llama's norm, but in the type of what it norms: theirs is in float32."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def llama() -> nn.Module:
    made = Scores(
        "Llama",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    inner = made.inner.model
    inner.norm = Norm(inner.norm.weight)
    for layer in inner.layers:
        layer.input_layernorm = Norm(layer.input_layernorm.weight)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm.weight)
    return made


def score_loss(scores: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), words.flatten())


KINDS = {"gpt": (gpt, next_byte_loss, 256), "gpt2": (gpt2, score_loss, WORDS), "llama": (llama, score_loss, WORDS)}


def batches(kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(KINDS[kind][2], (rows, LENGTH + 1), generator=generator) for rows in ROWS]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in words]


@functools.cache
def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


Steps = tuple[list[float], list[dict[str, torch.Tensor]], list[float], dict[str, torch.Tensor]]


@functools.cache
def one_process(kind: str) -> Steps:
    """Losses, gradients and their norms of each step, and the weights after all."""
    model = copy.deepcopy(model_of(kind))
    optimizer = make_optimizer(model)
    losses, gradients, norms = [], [], []
    for x, y in batches(kind):
        optimizer.zero_grad()
        loss = KINDS[kind][1](model(x), y)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), NORM)))
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return losses, gradients, norms, model.state_dict()


@pytest.fixture(scope="module")
def services() -> list[StageService]:
    return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, services: list[StageService]) -> Iterator[gradwire.Cluster]:
    with cluster_in_process(tmp_path_factory.mktemp("cluster"), 8, services) as made:
        yield made


def held(services: list[StageService], trainer: gradwire.Trainer) -> list[dict[str, torch.Tensor]]:
    """The tensors of each server of a run, in its order."""
    runs = [service.holder.current.run for service in services if service.holder.current is not None]
    by_server = {run.server: run.tensors for run in runs}
    return [by_server[name] for name in trainer.servers]


def check_one(trainer: gradwire.Trainer, services: list[StageService]) -> None:
    """What is not split is the same on all servers that have it; parts are the same on all replicas."""
    tensor = trainer.plan.tensor
    split = set() if tensor is None else {item.name for item in tensor.parameters}
    seen: dict[tuple[str, int], torch.Tensor] = {}
    shards = trainer.plan.shards
    for number, tensors in enumerate(held(services, trainer)):
        for name, value in tensors.items():
            first = seen.setdefault((name, number % shards if name in split else 0), value)
            assert torch.equal(first, value), f"{name} differs on server {number}"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt", {"tensor": 2, "stages": 2, "replicas": 2, "tensor_plan": "gpt", "zero": "on"}),
        ("gpt", {"tensor": 2, "stages": 2, "replicas": 2, "schedule": "zb-h1", "zero": "off"}),
        ("gpt", {"tensor": 4, "stages": 2, "tensor_plan": "gpt", "schedule": "zb-h1", "recompute": True}),
        ("gpt", {"tensor": 2, "replicas": 3, "recompute": True}),
        ("gpt2", {"tensor": 2, "stages": 2, "tensor_plan": "gpt2", "schedule": "zb-v"}),
        ("gpt2", {"tensor": 4, "replicas": 2, "zero": "on"}),
        ("llama", {"tensor": 2, "stages": 2, "tensor_plan": "llama", "schedule": "interleaved-1f1b"}),
        ("llama", {"tensor": 4, "stages": 2}),
    ],
    ids=str,
)
def test_training_equals_one_process(
    cluster: gradwire.Cluster, services: list[StageService], kind: str, fields: dict[str, Any]
) -> None:
    if kind != "gpt":
        pytest.importorskip("transformers")
    model = model_of(kind)
    plan = gradwire.Plan(**{"microbatches": 3, "schedule": "1f1b", **fields})
    losses, gradients, norms, state = one_process(kind)
    with cluster.trainer(
        model,
        make_optimizer(model),
        loss=KINDS[kind][1],
        example=batches(kind)[0],
        plan=plan,
        max_grad_norm=NORM,
    ) as trainer:
        assert len(trainer.servers) == plan.tensor * plan.stages * plan.replicas
        for step, (x, y) in enumerate(batches(kind)):
            result, made = trainer.step_with_gradients(x, y)
            assert result.loss == pytest.approx(losses[step], rel=1e-10)
            assert result.gradient_norm == pytest.approx(norms[step], rel=1e-10)
            assert made.keys() == gradients[step].keys()
            for name, gradient in gradients[step].items():
                close(name, made[name], gradient)
            check_one(trainer, services)
        found = trainer.state_dict()
    assert found.keys() == state.keys()
    for name, weight in state.items():
        close(name, found[name], weight)


def close(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape, name
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= 1e-10 * scale + 1e-15, f"{name} is off by {difference} of {scale}"


def test_a_shard_has_half_of_a_stage(cluster: gradwire.Cluster, services: list[StageService]) -> None:
    model = GPT(Shape(layers=2, width=32, heads=4, context=LENGTH))
    found = []
    for shards in (1, 2):
        plan = gradwire.Plan(tensor=shards, microbatches=1, tensor_plan="gpt")
        with cluster.trainer(
            model, make_optimizer(model), loss=next_byte_loss, example=batches("gpt")[0], plan=plan
        ) as trainer:
            trainer.step(*batches("gpt")[0])
            sizes = [sum(t.numel() * t.element_size() for t in each.values()) for each in held(services, trainer)]
            assert len(set(sizes)) == 1
            found.append(sizes[0])
    assert found[1] <= 0.55 * found[0]


@pytest.mark.parametrize(("kind", "plan"), [("gpt", "auto"), ("gpt2", "auto"), ("llama", "llama")])
def test_two_exchanges_a_layer_each_way(
    cluster: gradwire.Cluster, monkeypatch: pytest.MonkeyPatch, kind: str, plan: str
) -> None:
    """Attention and MLP: what Megatron-LM has. A vocabulary has four more: one look-up, two for scores, one back."""
    if kind != "gpt":
        pytest.importorskip("transformers")
    counts: Counter[str] = Counter()
    run = TensorGroup.run

    def counted(self: TensorGroup, name: str, collective: Any) -> Any:
        counts["backward" if name.endswith("/gradient") else "forward"] += 1
        return run(self, name, collective)

    model = model_of(kind)
    with cluster.trainer(
        model,
        make_optimizer(model),
        loss=KINDS[kind][1],
        example=batches(kind)[0],
        plan=gradwire.Plan(tensor=2, microbatches=3, tensor_plan=plan),
    ) as trainer:
        trainer.step(*batches(kind)[0])
        with monkeypatch.context() as patch:
            patch.setattr(TensorGroup, "run", counted)
            trainer.step(*batches(kind)[0])
        summary = trainer.plan.tensor
        assert summary is not None
    has_vocabulary = any(item.split == "vocab" for item in summary.parameters)
    forward, backward = 2 * 2 + 3 * has_vocabulary, 2 * 2 + has_vocabulary
    assert (summary.forward_exchanges, summary.backward_exchanges) == (forward, backward)
    # Of both servers, and three micro-batches.
    assert counts == {"forward": 2 * 3 * forward, "backward": 2 * 3 * backward}


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return Scores("GPT2", n_positions=LENGTH, n_embd=16, n_layer=2, n_head=4).double()


def test_dropout_draws_what_one_server_draws(four_processes: gradwire.Cluster) -> None:
    """Of scores of attention, which each server has some heads of, and of what all of them have."""
    pytest.importorskip("transformers")

    model, data = dropping(), batches("gpt2")

    def train(**fields: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        plan = gradwire.Plan(microbatches=3, **fields)
        with four_processes.trainer(
            model, make_optimizer(model), loss=score_loss, example=data[0], plan=plan, seed=7
        ) as trainer:
            return [trainer.step(*batch).loss for batch in data], trainer.state_dict()

    losses, state = train()
    for fields in ({"tensor": 2, "stages": 2, "schedule": "zb-h1"}, {"tensor": 4, "recompute": True}):
        other_losses, other_state = train(**fields)
        assert other_losses == pytest.approx(losses, rel=1e-10)
        for name, weight in state.items():
            close(name, other_state[name], weight)


def test_a_shard_that_stands_still_or_dies_in_a_step_is_named() -> None:
    """First one stands still, and goes on when the run is over; then, in another run, one dies."""
    model, data = GPT(SHAPE), batches("gpt")

    def train(cluster: gradwire.LocalCluster, **fields: Any) -> gradwire.Trainer:
        plan = gradwire.Plan(tensor=2, microbatches=4, **fields)
        return cluster.trainer(model, make_optimizer(model), loss=next_byte_loss, example=data[0], plan=plan)

    with gradwire.local(stage_servers=4, threads=1) as cluster:
        with train(cluster, stages=2, stall_seconds=2.0) as trainer:
            victim = trainer.servers[1]
            frozen = process_of(cluster, victim)
            try:
                error = failure(trainer, data[0], frozen.suspend)
            finally:
                frozen.resume()
            assert victim in str(error)
        wait_until_free(cluster)
        with train(cluster, stages=2) as trainer:
            victim = trainer.servers[3]
            error = failure(trainer, data[0], lambda: os.kill(process_of(cluster, victim).pid, signal.SIGKILL))
            assert isinstance(error, gradwire.StageFailed)
            assert victim in str(error)
        wait_until_free(cluster)
