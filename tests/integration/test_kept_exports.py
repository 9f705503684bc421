"""What tests take for the same model: its graphs are those of an export of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kept_exports
import pytest
import torch
import torch.nn.functional as F
from kept_exports import KeptExports
from torch import nn

from gradwire.graph import export_model


class Scaled(nn.Module):
    def __init__(self, width: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("offset", torch.ones(width))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale + self.offset


def tied() -> nn.Module:
    model = Scaled()
    model.second.weight = model.first.weight
    return model


def hooked() -> nn.Module:
    model = Scaled()
    model.first.register_forward_hook(lambda module, arguments, output: output + 1)
    return model


def frozen() -> nn.Module:
    model = Scaled()
    model.first.weight.requires_grad_(False)
    return model


def constant() -> nn.Module:
    model = Scaled()
    model.scale = torch.tensor(3.0)  # type: ignore[assignment]
    return model


def smooth_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.smooth_l1_loss(output, target)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were really exported."""
    models: list[nn.Module] = []

    def export(model: nn.Module, *arguments: Any, **settings: Any) -> Any:
        models.append(model)
        return export_model(model, *arguments, **settings)

    monkeypatch.setattr(kept_exports, "export_model", export)
    return models


def example(rows: int = 4, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, width), torch.randn(rows, width)


def test_a_model_like_one_before_has_the_same_graphs_and_its_own_tensors(exported: list[nn.Module]) -> None:
    kept = KeptExports()
    first, second = Scaled(), Scaled()
    kept.export(first, F.mse_loss, example())
    found = kept.export(second, F.mse_loss, example())
    assert exported == [first]
    own = export_model(second, F.mse_loss, example())
    assert found.proto == own.proto
    assert {name: id(tensor) for name, tensor in found.tensors.items()} == {
        name: id(tensor) for name, tensor in own.tensors.items()
    }


@pytest.mark.parametrize(
    ("make", "loss", "batch", "settings"),
    [
        (lambda: Scaled(scale=3.0), F.mse_loss, example(), {}),
        (lambda: Scaled(5), F.mse_loss, example(width=5), {}),
        (lambda: Scaled().double(), F.mse_loss, tuple(x.double() for x in example()), {}),
        (lambda: Scaled().eval(), F.mse_loss, example(), {}),
        (tied, F.mse_loss, example(), {}),
        (hooked, F.mse_loss, example(), {}),
        (frozen, F.mse_loss, example(), {}),
        (constant, F.mse_loss, example(), {}),
        (Scaled, smooth_loss, example(), {}),
        (Scaled, F.mse_loss, example(rows=6), {}),
        (Scaled, F.mse_loss, example(), {"precision": torch.bfloat16}),
        (Scaled, F.mse_loss, example(), {"micro_batch_rows": 2}),
    ],
    ids=[
        *("number", "width", "type", "eval", "tied", "hook", "frozen", "constant", "loss", "rows", "precision"),
        "micro-batch",
    ],
)
def test_another_one_is_exported(
    exported: list[nn.Module], make: Callable[[], nn.Module], loss: Any, batch: Any, settings: dict[str, Any]
) -> None:
    kept = KeptExports()
    other = make()
    kept.export(Scaled(), F.mse_loss, example())
    found = kept.export(other, loss, batch, **settings)
    assert len(exported) == 2
    assert exported[1] is other
    assert found.tensors["first.weight"] is other.first.weight
