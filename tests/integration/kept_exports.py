"""Exports that are kept, for sweeps that run one model many times: an export is most of a short run's time."""

from __future__ import annotations

import dataclasses
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gradwire.graph import ExportedModel, export_model
from gradwire.graph.tensors import TensorTable


class KeptExports:
    """Exports that are kept by what a model is made of: the same classes, settings, shapes and ties, loss and example.

    The graphs of such models are the same; the tensors are each model's own. What is not plain to see (hooks, tensors
    that are no parameters or buffers, objects of the user's own) is exported anew each time.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, ExportedModel] = {}

    def export(self, model: nn.Module, loss: Any, example: Any, **settings: Any) -> ExportedModel:
        try:
            key = (_of_module(model), _of_loss(loss), _of_example(example), _of_settings(settings))
        except _NotPlain:
            return export_model(model, loss, example, **settings)
        kept = self._kept.get(key)
        live = TensorTable(model, loss).tensors
        if kept is not None and kept.tensors.keys() == live.keys():
            return dataclasses.replace(kept, tensors=live)
        made = export_model(model, loss, example, **settings)
        if made.tensors.keys() == live.keys():  # otherwise it has constants, which are this model's own
            self._kept[key] = dataclasses.replace(made, tensors=dict.fromkeys(live, torch.empty(0)))
        return made


class _NotPlain(Exception):
    """Something has more to it than can be compared."""


_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)


def _plain(value: Any) -> Any:
    """Return what stands for a value: equal only for equal ones, functions and classes being themselves."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, dict):
        return dict, tuple((_plain(name), _plain(item)) for name, item in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    raise _NotPlain


def _of_tensor(tensor: torch.Tensor) -> Any:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, str(tensor.device), tensor.requires_grad


def _of_module(module: nn.Module) -> Any:
    state = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    tensors = tuple((name, first.setdefault(id(tensor), name), _of_tensor(tensor)) for name, tensor in state)
    return tensors, tuple((name, type(part), _attributes(part)) for name, part in module.named_modules())


# What nn.Module keeps of itself, but for tensors and parts, which are seen otherwise.
_OWN = vars(nn.Module()).keys() - {"training", "_non_persistent_buffers_set"}


def _attributes(module: nn.Module) -> Any:
    found = vars(module)
    if any(found[name] for name in _OWN if name.endswith(("_hooks", "_pre_hooks"))):
        raise _NotPlain
    own = {name: value for name, value in found.items() if name not in _OWN}
    own["_non_persistent_buffers_set"] = sorted(own.get("_non_persistent_buffers_set", ()))
    return _plain(own)


def _of_loss(loss: Any) -> Any:
    return _of_module(loss) if isinstance(loss, nn.Module) else _plain(loss)


def _of_example(example: Any) -> Any:
    leaves, structure = pytree.tree_flatten(example)
    return str(structure), tuple(
        _of_tensor(leaf) if isinstance(leaf, torch.Tensor) else _plain(leaf) for leaf in leaves
    )


def _of_settings(settings: dict[str, Any]) -> Any:
    return _plain(settings), torch.get_default_dtype(), torch.is_grad_enabled()
