"""A torch.optim object as data: its class, its groups by tensor name, and its current hyperparameters.

The servers make optimizers of the same class over their own tensors; the user's object never takes a step, it only
holds the hyperparameters, which are read anew for every step.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradwire_protocol.errors import OptimizerError
from gradwire_protocol.v1 import graph_pb2, run_pb2

# Those that treat each parameter on its own, and need no closure.
SUPPORTED = (
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)


_NO_FORM = object()


class OptimizerReader:
    """Reads a torch optimizer for the wire.

    Holds the optimizer by a weak reference, so that the client keeps no weights alive on its behalf: once the user has
    let go of it, nobody can change its hyperparameters, and those read last stay true.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """tensors: TensorSpec.name to the user's live tensor. OptimizerError for what cannot be carried over."""
        _check(optimizer)
        names = {id(tensor): name for name, tensor in tensors.items()}
        self._name = type(optimizer).__name__
        self._members = _members(optimizer, model, names)
        # `defaults` also has entries that only the class itself sets.
        known = inspect.signature(type(optimizer)).parameters
        self._keys = tuple(key for key in optimizer.defaults if key in known)
        self._optimizer = weakref.ref(optimizer)
        self._groups = _plain_groups(optimizer)
        self._settings = self._read(optimizer)

    def describe(self) -> run_pb2.Optimizer:
        """Return class, groups with their members, and settings as they are now."""
        groups = [
            run_pb2.OptimizerGroup(parameters=members, settings=settings)
            for members, settings in zip(self._members, self._current(), strict=True)
        ]
        return run_pb2.Optimizer(name=self._name, groups=groups)

    def hyperparameters(self) -> run_pb2.Hyperparameters:
        """Return the groups' settings as they are now, for the step that is dispatched next."""
        return run_pb2.Hyperparameters(
            groups=[run_pb2.OptimizerGroup(settings=settings) for settings in self._current()]
        )

    def mark_dispatched(self) -> None:
        """Tell torch's schedulers that a step was taken: without it they warn that they were called too early."""
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # set by torch itself in optimizer.step()

    def remake(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return a new optimizer of the same class, groups and hyperparameters over a copy of the model, without state.

        OptimizerError if the user has let go of the optimizer.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise OptimizerError(
                "The optimizer is gone: nothing refers to it any more",
                expected="the optimizer that the trainer was made with",
                remedy="keep a variable that refers to it",
            )
        parameters = dict(model.named_parameters())
        groups = [
            {**{key: group[key] for key in self._keys if key in group}, "params": [parameters[name] for name in names]}
            for group, names in zip(optimizer.param_groups, self._members, strict=True)
        ]
        return type(optimizer)(groups)  # type: ignore[call-arg]  # every class of SUPPORTED has defaults for the rest

    @property
    def name(self) -> str:
        """Class name in torch.optim."""
        return self._name

    @property
    def members(self) -> list[list[str]]:
        """TensorSpec names of each group's members."""
        return self._members

    def settings(self) -> list[dict[str, Any]]:
        """Return all settings of each group as they are now, for JSON: also what schedulers put there."""
        self._current()
        return [dict(group) for group in self._groups]

    def restore(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Set the groups' settings, also in the user's optimizer, as its own load_state_dict would."""
        optimizer = self._optimizer()
        if optimizer is None:
            self._groups = [dict(group) for group in groups]
            self._settings = [self._arguments(index, group) for index, group in enumerate(groups)]
            return
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            for key, value in saved.items():
                present = group.get(key)
                if isinstance(present, torch.Tensor):
                    present.fill_(value)
                elif key != "params":
                    group[key] = tuple(value) if isinstance(value, list) else value

    def _current(self) -> list[list[graph_pb2.NamedArgument]]:
        optimizer = self._optimizer()
        if optimizer is not None:
            self._settings = self._read(optimizer)
            self._groups = _plain_groups(optimizer)
        return self._settings

    def _read(self, optimizer: torch.optim.Optimizer) -> list[list[graph_pb2.NamedArgument]]:
        if len(optimizer.param_groups) != len(self._members):
            raise OptimizerError(
                "The optimizer's groups changed during the run",
                expected=f"{len(self._members)} groups, as when the trainer was made",
                got=str(len(optimizer.param_groups)),
                remedy="make a new trainer",
            )
        return [self._arguments(index, group) for index, group in enumerate(optimizer.param_groups)]

    def _arguments(self, index: int, group: Mapping[str, Any]) -> list[graph_pb2.NamedArgument]:
        return [
            graph_pb2.NamedArgument(name=key, value=_argument(f"group {index}, {key}", group[key]))
            for key in self._keys
            if key in group
        ]


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            "The optimizer is not a torch optimizer",
            expected="an object of a class of torch.optim, over model.parameters()",
            got=repr(type(optimizer)),
        )
    kind = type(optimizer)
    if getattr(torch.optim, kind.__name__, None) is not kind or kind.__name__ not in SUPPORTED:
        raise OptimizerError(
            f"{kind.__module__}.{kind.__qualname__} cannot run on stage servers",
            expected=f"one of torch.optim's own classes {', '.join(SUPPORTED)}",
            got="a class of that name elsewhere, or one that needs a closure or sparse gradients",
            remedy="use one of these classes itself, not a subclass",
        )
    # Adagrad makes its state at once, for step 0.
    if any(state.get("step", 1) != 0 for state in optimizer.state.values()):
        raise OptimizerError(
            "The optimizer has state already",
            expected="a new optimizer: its state lives on the stage servers",
            got=f"state of {len(optimizer.state)} parameters",
            remedy="make a new optimizer over model.parameters()",
        )
    if optimizer.defaults.get("differentiable"):
        raise OptimizerError("differentiable=True cannot be carried over", expected="differentiable=False")


def _members(optimizer: torch.optim.Optimizer, model: nn.Module, names: Mapping[int, str]) -> list[list[str]]:
    """Return each group's TensorSpec names. Parameters that no graph reads never get a gradient: they are left out."""
    own = {id(parameter) for parameter in model.parameters()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        members = []
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in own:
                raise OptimizerError(
                    "The optimizer holds a parameter that is not the model's",
                    expected="parameters out of model.parameters(), by identity",
                    got=f"number {position} of group {index}, of shape {tuple(parameter.shape)}",
                    remedy="make the optimizer after the model has its final parameters (moving or converting "
                    "a model can replace them)",
                )
            if id(parameter) in names:
                members.append(names[id(parameter)])
        groups.append(members)
    return groups


def _plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what each group has besides its members, as far as JSON has a form for it."""
    return [
        {key: plain for key, value in group.items() if key != "params" and (plain := _plain(value)) is not _NO_FORM}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return _NO_FORM if _NO_FORM in items else items
    return value if value is None or isinstance(value, bool | int | float | str) else _NO_FORM


def _argument(where: str, value: Any) -> graph_pb2.Argument:
    """Return a setting as a literal. Tensors with one element (a tensor lr) become numbers."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None:
        return graph_pb2.Argument(none=graph_pb2.Nothing())
    if isinstance(value, bool):
        return graph_pb2.Argument(boolean=value)
    if isinstance(value, int):
        return graph_pb2.Argument(integer=value)
    if isinstance(value, float):
        return graph_pb2.Argument(real=value)
    if isinstance(value, str):
        return graph_pb2.Argument(text=value)
    if isinstance(value, tuple | list):
        items = [_argument(where, item) for item in value]
        return graph_pb2.Argument(list=graph_pb2.ArgumentList(items=items))
    raise OptimizerError(
        f"The optimizer's setting ({where}) cannot travel",
        expected="a number, text, None, or a list of them",
        got=repr(value),
    )
