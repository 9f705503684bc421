"""Copies of the user's model for the exporter to work on, so that the model itself is never changed.

A copy has module objects, modes and hooks of its own, but the same tensors. State that a forward pass keeps on its
modules (fake tensors, during export) stays on the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from gradwire_protocol.errors import ModelError

Loss = Any  # a callable, a module, or None
_SHOWN = 5


def copy_model(model: nn.Module, loss: Loss, *, fresh_buffers: bool = False) -> tuple[nn.Module, Loss]:
    """Copy model and loss without their tensors. `fresh_buffers` clones what a forward pass may write to.

    Parameters on the meta device become fake ones on the CPU: models take branches by device, and meta tensors
    would lead them astray.
    """
    memo: dict[int, Any] = {}
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    for tensor, is_parameter in _tensors(model, loss):
        if tensor.is_meta:
            memo[id(tensor)] = _fake_like(tensor, fake)
        elif fresh_buffers and not is_parameter:
            memo[id(tensor)] = tensor.detach().clone()
        else:
            memo[id(tensor)] = tensor
    for value in _attributes(model, loss):
        if isinstance(value, CustomOpDef):  # it cannot be copied, nor needs to be
            memo[id(value)] = value
    try:
        return copy.deepcopy((model, loss), memo)
    except Exception as error:
        raise ModelError(
            "The model cannot be copied for export",
            got=f"{type(error).__name__}: {error}",
            remedy="keep objects that cannot be copied (files, locks, connections) out of the model, or give the "
            "class that holds them a __deepcopy__",
        ) from error


def is_on_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer has no data."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def refuse_empty_buffers(model: nn.Module) -> None:
    """ModelError for what is on the meta device and in no checkpoint: non-persistent buffers, plain attributes."""
    empty = []
    for path, module in model.named_modules():
        names = [name for name in module._non_persistent_buffers_set if name in module._buffers]
        names += [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        empty += [
            f"{path}.{name}" if path else name
            for name in sorted(names)
            if (value := getattr(module, name)) is not None and value.is_meta
        ]
    if empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise ModelError(
            "The model has tensors that are on the meta device and in no checkpoint",
            expected="non-persistent buffers and plain tensor attributes with their contents",
            got=f"empty ones: {', '.join(empty[:_SHOWN])}{more}",
            remedy="build the model under `with gradwire.meta_parameters():`, which empties only its parameters",
        )


def _tensors(model: nn.Module, loss: Loss) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield all tensors that hang on the modules: parameters, buffers, plain attributes."""
    for module in _modules(model, loss):
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter, True
        for buffer in module._buffers.values():
            if buffer is not None:
                yield buffer, False
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                yield value, isinstance(value, nn.Parameter)


def _modules(model: nn.Module, loss: Loss) -> Iterator[nn.Module]:
    yield from model.modules()
    if isinstance(loss, nn.Module):
        yield from loss.modules()


def _attributes(model: nn.Module, loss: Loss) -> Iterator[Any]:
    """Yield the loss, and what else hangs on the modules."""
    yield loss
    for module in _modules(model, loss):
        yield from vars(module).values()


def _fake_like(tensor: torch.Tensor, fake: FakeTensorMode) -> torch.Tensor:
    with fake:
        copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
