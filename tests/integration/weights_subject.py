"""What tests of weights from files share: the model, files of each form, training with them and in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import gradwire

WIDTH = 8
PLAN = gradwire.Plan(stages=2, microbatches=2)


class Body(nn.Module):
    """Weights tied between its ends, a table that no checkpoint has, buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(self.embedding(tokens))) * self.table
        return self.head(hidden + torch.tanh(self.second(hidden)))


class WithNewHead(nn.Module):
    """A body whose weights come from files, and a head that is new."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.classes = nn.Linear(12, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classes(self.body(tokens))


def make_real(make: Callable[[], nn.Module] = Body) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def make_meta(make: Callable[[], nn.Module] = Body) -> nn.Module:
    with gradwire.meta_parameters():
        return make().double()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def make_batch(seed: int, classes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(12, (6,), generator=generator), torch.randint(classes, (6,), generator=generator)


def state_for_file(model: nn.Module, *, keep: str = "embedding.weight", drop: str = "head.weight") -> dict[str, Any]:
    """A state dict with the tied tensor under one of its names, as save_file wants it."""
    assert torch.equal(model.state_dict()[keep], model.state_dict()[drop])
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != drop}


def save_sharded(state: dict[str, torch.Tensor], directory: Path, shards: int = 3) -> None:
    """As Hugging Face's save_pretrained does it."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    places = {name: f"model-{index % shards:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_weights(root: Path) -> Path:
    """Write weights of one model in each form, and what must be refused, to a directory; return it."""
    state = state_for_file(make_real())
    for name in ("whole", "damaged", "pickled", "narrow", "lossy", "misshapen", "missing", "other-name"):
        (root / name).mkdir()
    save_file(state, root / "whole/model.safetensors")
    save_sharded(state, root / "sharded")
    save_file(
        state_for_file(make_real(), keep="head.weight", drop="embedding.weight"), root / "other-name/a.safetensors"
    )
    save_file(
        {name: item.float() if item.is_floating_point() else item for name, item in state.items()},
        root / "narrow/a.safetensors",
    )
    save_file(state | {"first.weight": torch.zeros(WIDTH, WIDTH, dtype=torch.int64)}, root / "lossy/a.safetensors")
    save_file(state | {"first.weight": torch.zeros(WIDTH, 3).double()}, root / "misshapen/a.safetensors")
    save_file({name: item for name, item in state.items() if name != "second.bias"}, root / "missing/a.safetensors")
    (root / "damaged/a.safetensors").write_bytes((root / "whole/model.safetensors").read_bytes()[:-9])
    torch.save(state, root / "pickled/pytorch_model.bin")
    return root


def train(
    cluster: gradwire.Cluster, model: nn.Module, weights: Any, classes: int = 12, **changes: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    arguments = {"loss": F.cross_entropy, "example": make_batch(0, classes), "plan": PLAN} | changes
    with cluster.trainer(model, make_optimizer(model), weights=weights, **arguments) as trainer:
        losses = [trainer.step(*make_batch(seed, classes)).loss for seed in range(2)]
        return losses, trainer.state_dict()


def train_here(model: nn.Module, classes: int = 12) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer = make_optimizer(model)
    losses = []
    for seed in range(2):
        optimizer.zero_grad()
        x, y = make_batch(seed, classes)
        parts = [F.cross_entropy(model(a), b) / 2 for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True)]
        for part in parts:
            part.backward()
        losses.append(sum(part.item() for part in parts))
        optimizer.step()
    return losses, model.state_dict()


def assert_equal(got: tuple[list[float], dict[str, Any]], expected: tuple[list[float], dict[str, Any]]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-10)
    assert list(got[1]) == list(expected[1])
    for name, tensor in expected[1].items():
        torch.testing.assert_close(got[1][name], tensor, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
