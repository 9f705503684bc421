"""Runs a torch.optim optimizer, named on the wire, over the tensors that this server holds.

Only classes of a fixed list are made, with settings that their own constructor knows. Gradients are the executor's
business.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gradwire_protocol.errors import OptimizerError
from gradwire_protocol.optimizer_state import STATE_FACTORS
from gradwire_protocol.v1 import graph_pb2, run_pb2

ALLOWED = frozenset(name for name in STATE_FACTORS if hasattr(torch.optim, name))

Setting = bool | int | float | str | None | tuple[Any, ...]
# What an optimizer keeps for a parameter.
StateValue = torch.Tensor | int | float | bool


def warm_up() -> None:
    """Make torch import what its first optimizer or custom operator needs, before that.

    That is its compiler, which takes seconds, where nothing stands in for it (`without_compiler.py`). Takes no time
    when it has been done.
    """
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


def _setting(name: str, argument: graph_pb2.Argument) -> Setting:
    match argument.WhichOneof("kind"):
        case "none":
            return None
        case "boolean":
            return argument.boolean
        case "integer":
            return argument.integer
        case "real":
            return argument.real
        case "text":
            return argument.text
        case "list":
            return tuple(_setting(name, item) for item in argument.list.items)
        case kind:
            raise OptimizerError(
                f"Setting {name!r} of the optimizer cannot be carried over",
                expected="none, a boolean, a number, text, or a list of them",
                got=str(kind),
            )


def _settings(group: run_pb2.OptimizerGroup, known: frozenset[str], optimizer: str) -> dict[str, Setting]:
    settings = {item.name: _setting(item.name, item.value) for item in group.settings}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise OptimizerError(
            f"{optimizer} has no setting {', '.join(map(repr, unknown))}",
            expected=f"some of {', '.join(sorted(known))}",
            got=", ".join(unknown),
            remedy="send what the optimizer's own `defaults` name",
        )
    return settings


class StageOptimizer:
    """An optimizer over those members of each group that are in `tensors`.

    Groups without a member here make no group in torch, but keep their index for `set_hyperparameters`. Parameters
    without a gradient are skipped, as in torch. OptimizerError for what torch would refuse, too.
    """

    def __init__(self, spec: run_pb2.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
        if spec.name not in ALLOWED:
            raise OptimizerError(
                f"The optimizer {spec.name!r} cannot run on stage servers",
                expected=f"one of {', '.join(sorted(ALLOWED))}",
                got=spec.name,
                remedy="use one of these; others need all parameters in one place, or a closure",
            )
        kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, spec.name)
        self._kind = kind
        self._name = spec.name
        # What trains here, by name, and back.
        trained = {name for group in spec.groups for name in group.parameters}
        self._tensors = {name: tensor for name, tensor in tensors.items() if name in trained}
        self._name_of = {tensor: name for name, tensor in self._tensors.items()}
        # Groups may set what torch itself puts into them; constructors take less (AdamW: decoupled_weight_decay).
        self._known = frozenset(kind([torch.nn.Parameter(torch.zeros(1, 1))]).defaults)
        self._groups = len(spec.groups)
        self._group_of: dict[int, dict[str, Any]] = {}  # index of the group on the wire → group of torch
        groups: dict[int, dict[str, Any]] = {}
        seen: set[str] = set()
        for index, group in enumerate(spec.groups):
            repeated = sorted(seen.intersection(group.parameters))
            if repeated:
                raise OptimizerError("A parameter is in two groups of the optimizer", got=", ".join(repeated))
            seen.update(group.parameters)
            settings = _settings(group, self._known, spec.name)
            members = [tensors[name] for name in group.parameters if name in tensors]
            if members:
                groups[index] = {"params": members, **settings}
        self._optimizer: torch.optim.Optimizer | None = None
        if groups:
            self._begin(groups)

    def set_hyperparameters(self, groups: Sequence[run_pb2.OptimizerGroup]) -> None:
        """Take the values of an entry: one group on the wire for each group of the optimizer, in the same order."""
        if len(groups) != self._groups:
            raise OptimizerError(
                "The hyperparameters do not fit the optimizer",
                expected=f"{self._groups} groups",
                got=str(len(groups)),
            )
        for index, group in self._group_of.items():
            group.update(_settings(groups[index], self._known, self._name))

    def step(self) -> None:
        """Update every member that has a gradient."""
        if self._optimizer is not None:
            self._optimizer.step()

    def state_of(self, name: str) -> dict[str, StateValue]:
        """Return the live state of a parameter, by torch's names; empty before its first update."""
        if self._optimizer is None:
            return {}
        parameter = self._tensors.get(name)
        state: Mapping[str, StateValue | None] = {} if parameter is None else self._optimizer.state.get(parameter, {})
        return {key: value for key, value in state.items() if value is not None}

    def restore(self, states: Mapping[str, Mapping[str, StateValue]]) -> None:
        """Take on the state of each named parameter; the others begin as they did. Tensors become the optimizer's.

        Settings stay. OptimizerError for what cannot be the state of a parameter here.
        """
        for name, state in states.items():
            for key, value in state.items():
                self._check_value(name, key, value)
        if self._optimizer is None:
            return
        self._begin({index: dict(group) for index, group in self._group_of.items()})
        for group in self._optimizer.param_groups:
            # As torch has it: counters stay on the host, unless the update itself runs without it.
            on_host = not (group.get("capturable") or group.get("fused"))
            for parameter in group["params"]:
                state = states.get(self._name_of[parameter], {})
                if state:
                    self._optimizer.state[parameter] = {
                        key: value.to("cpu" if key == "step" and on_host else parameter.device)
                        if isinstance(value, torch.Tensor)
                        else value
                        for key, value in state.items()
                    }

    def close(self) -> None:
        """Let go of the parameters and of the optimizer's state."""
        self._optimizer = None
        self._group_of.clear()
        self._tensors.clear()
        self._name_of.clear()

    def _begin(self, groups: Mapping[int, dict[str, Any]]) -> None:
        """Make the optimizer, without state, over groups by their index on the wire."""
        # Settings come with every group, but some constructors check their own defaults: give them the first's.
        first = next(iter(groups.values()))
        taken = inspect.signature(self._kind).parameters.keys() - {"params"}
        defaults = {name: value for name, value in first.items() if name in taken}
        try:
            # The class varies, and so do its settings; torch itself checks them.
            self._optimizer = self._kind(list(groups.values()), **defaults)
        except (ValueError, TypeError, RuntimeError) as error:
            raise OptimizerError(
                f"torch.optim.{self._name} refuses its settings", got=f"{type(error).__name__}: {error}"
            ) from error
        self._group_of = dict(zip(groups, self._optimizer.param_groups, strict=True))

    def _check_value(self, name: str, key: str, value: StateValue) -> None:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise OptimizerError(
                f"State of {name!r} came, which the optimizer does not train here",
                expected="parameters of the optimizer's groups",
                got=f"{name!r}, {key!r}",
            )
        if isinstance(value, torch.Tensor) and value.numel() > max(1, tensor.numel()):
            raise OptimizerError(
                f"The optimizer's {key!r} does not fit {name!r}",
                expected=f"{tensor.numel()} elements at most",
                got=f"shape {list(value.shape)}",
            )
