"""The table of a model's tensors: parameters, buffers and constants, by the user's own names, ties as one entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from gradwire.graph.copying import Loss
from gradwire.graph.source import user_name
from gradwire_protocol.errors import ModelError
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import graph_pb2 as pb

LOSS_PREFIX = "loss."
_LITERAL = "lifted_tensor"  # torch's name for a tensor made from numbers in the code
_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class TensorTable:
    """Specs and live tensors of a model and its loss. Programs of the model add their constants."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._specs: dict[str, pb.TensorSpec] = {}
        self._names: dict[str, str] = {}  # every name of the user → the first one of the same tensor
        self._known: dict[int, str] = {}  # id of a tensor → its first name
        for name, tensor, persistent in _state(model, ""):
            self._add(name, tensor, persistent)
        if isinstance(loss, nn.Module):
            for name, tensor, persistent in _state(loss, LOSS_PREFIX):
                if name in self._names:
                    raise ModelError(
                        f"Both the model and its loss have a tensor named '{name}'",
                        remedy="rename the model's attribute 'loss'",
                    )
                self._add(name, tensor, persistent)

    @property
    def specs(self) -> list[pb.TensorSpec]:
        """All entries, in the order of the user's names."""
        return list(self._specs.values())

    def spec(self, name: str) -> pb.TensorSpec:
        """The entry of this first name."""
        return self._specs[name]

    def first_name(self, name: str) -> str:
        """The entry's name for any of a tensor's names."""
        return self._names[name]

    def uses(self, program: ExportedProgram) -> Iterator[tuple[str, str, str]]:
        """Yield (placeholder, value name, tensor name) for each tensor that a program takes."""
        for item in program.graph_signature.input_specs:
            if item.kind not in _STATE:
                continue
            target = str(item.target)
            if item.kind is InputKind.CONSTANT_TENSOR:
                name = self.constant(user_name(target), program.constants[target])
            else:
                name = self._names[user_name(target)]
            yield item.arg.name, f"tensor.{user_name(target)}", name

    def constant(self, name: str, tensor: torch.Tensor) -> str:
        """Enter a constant, unless it is known, and return its name."""
        if id(tensor) in self._known:
            return self._known[id(tensor)]
        for other, known in self.tensors.items():
            if _same_memory(known, tensor):  # code refers to a parameter of the model itself, as a regulariser does
                return other
        if tensor.requires_grad:
            raise ModelError(
                f"The model or loss uses a tensor with gradient that is not its parameter ('{name}')",
                expected="parameters registered on the model, or on a loss that is an nn.Module",
                got=f"a tensor of shape {tuple(tensor.shape)} that code refers to",
                remedy="assign it as an nn.Parameter of the model, or give the loss as a module",
            )
        if name.rpartition(".")[2].startswith(_LITERAL):
            # Each export lifts literals of the code anew. They are copied before use, so equal ones can be one.
            for other, spec in self._specs.items():
                if spec.kind == pb.TENSOR_KIND_CONSTANT and _same(self.tensors[other], tensor):
                    return other
        while name in self._names:
            name += "_"
        self._add(name, tensor, persistent=False, constant=True)
        return name

    def _add(self, name: str, tensor: torch.Tensor, persistent: bool, constant: bool = False) -> None:
        first = self._known.get(id(tensor))
        if first is not None:
            self._specs[first].names.append(name)
            self._specs[first].persistent |= persistent
            self._names[name] = first
            return
        if tensor.dtype not in DATA_TYPES:
            raise ModelError(
                f"Tensor '{name}' has a dtype that cannot travel",
                expected=", ".join(str(dtype) for dtype in DATA_TYPES),
                got=str(tensor.dtype),
                remedy="convert it",
            )
        if constant:
            kind = pb.TENSOR_KIND_CONSTANT
        else:
            kind = pb.TENSOR_KIND_PARAMETER if isinstance(tensor, nn.Parameter) else pb.TENSOR_KIND_BUFFER
        self._known[id(tensor)] = self._names[name] = name
        self.tensors[name] = tensor
        self._specs[name] = pb.TensorSpec(
            name=name,
            names=[name],
            kind=kind,
            persistent=persistent,
            requires_grad=tensor.requires_grad,
            data_type=DATA_TYPES[tensor.dtype],
            shape=tensor.shape,
        )


def refuse_lost_state(attributes: Iterable[str], program: ExportedProgram) -> None:
    """ModelError if the forward pass both reads and assigns a tensor that is a plain attribute."""
    read = {str(item.target) for item in program.graph_signature.input_specs if item.kind is InputKind.CONSTANT_TENSOR}
    for name in read.intersection(attributes):
        raise ModelError(
            f"The forward pass changes '{user_name(name)}', a plain attribute: the change would be lost",
            expected="state that is registered as a buffer",
            got="a tensor attribute",
            remedy=f"register it: self.register_buffer('{name.rpartition('.')[2]}', …)",
        )


def _state(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield every name of every parameter and buffer, ties repeated, and whether it is part of the state dict."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield prefix + name, parameter, True
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                full = f"{prefix}{path}.{name}" if path else prefix + name
                yield full, buffer, name not in owner._non_persistent_buffers_set


def _same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.device == second.device
        and not first.is_meta
        and first.numel() > 0
        and (first.data_ptr(), first.dtype, first.shape, first.stride())
        == (second.data_ptr(), second.dtype, second.shape, second.stride())
    )


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
