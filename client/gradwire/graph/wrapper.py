"""The model and its loss as one module over the tensors of a batch: what is exported.

Its outputs are the loss (and its weight), the leaves of the model's output, and the new values of buffers that the
forward pass assigned: export itself would drop these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gradwire.graph.batch import BatchLayout
from gradwire.graph.source import location_of_function, user_name
from gradwire_protocol.errors import ModelError

KEEP = torch.ops.aten.alias.default
_SCALAR_REMEDY = "return a scalar such as loss.mean(), or (sum, weight), both scalars"


@dataclass
class OutputLayout:
    """What the outputs of a traced wrapper are, in order. Filled while the wrapper runs."""

    loss: int = 0  # 0: none, 1: a mean, 2: (sum, weight)
    structure: pytree.TreeSpec | None = None  # of the model's output
    constants: list[Any] = field(default_factory=list)  # its leaves that are no tensors; None for tensors
    is_tensor: list[bool] = field(default_factory=list)
    assigned_buffers: list[str] = field(default_factory=list)  # names within the wrapper
    assigned_attributes: set[str] = field(default_factory=set)


class _Record:
    """Keeps the layout of the last forward pass; torch.export undoes assignments to the wrapper itself."""

    layout = OutputLayout()


class Wrapper(nn.Module):
    """Calls the model with a batch's tensors, and the loss with its output and the target."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any] | nn.Module | None,
        batch: BatchLayout,
        *,
        with_loss: bool,
        with_output: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss if isinstance(loss, nn.Module) else None
        self._loss_function = (loss,)  # hidden in a tuple: a module would be registered twice
        self._batch = batch
        self._with_loss = with_loss
        self._with_output = with_output
        self._record = _Record()

    @property
    def outputs(self) -> OutputLayout:
        """What the outputs of the last forward pass were."""
        return self._record.layout

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return loss, weight, output leaves and assigned buffers, as far as they are there."""
        outputs = self._record.layout = OutputLayout()
        buffers = dict(self.named_buffers())
        attributes = _tensor_attributes(self)
        arguments, keywords, target = self._batch.rebuild(tensors, with_target=self._with_loss)
        output = self.model(*arguments, **keywords)
        kept: list[Any] = []
        if self._with_output:
            leaves, outputs.structure = pytree.tree_flatten(output)
            for leaf in leaves:
                is_value = isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool)
                outputs.is_tensor.append(is_value)
                outputs.constants.append(None if is_value else leaf)
                # The loss must not get hold of what is returned: an operator that gives back the very tensor that it
                # was given, such as to() or broadcast_tensors(), would make it the loss's in the trace.
                kept += [KEEP(leaf) if isinstance(leaf, torch.Tensor) else leaf] if is_value else []
        results: list[Any] = []
        if self._with_loss:
            loss = self._loss_of(output, target)
            outputs.loss = len(loss)
            results += loss
        results += kept
        outputs.assigned_buffers = [name for name, buffer in self.named_buffers() if buffer is not buffers[name]]
        for name in outputs.assigned_buffers:
            results.append(self._new_buffer(name, buffers[name]))
        now = _tensor_attributes(self)
        outputs.assigned_attributes = {name for name, tensor in attributes.items() if now.get(name) is not tensor}
        return tuple(results)

    def _loss_of(self, output: Any, target: Any) -> list[torch.Tensor]:
        (function,) = self._loss_function
        if function is None:
            loss = _own_loss(output)
        else:
            loss = function(output, target)
        parts = list(loss) if isinstance(loss, tuple | list) else [loss]
        if len(parts) not in (1, 2) or not isinstance(parts[0], torch.Tensor):
            raise ModelError(
                "The loss is not a scalar tensor",
                expected="a 0-dimensional floating-point tensor",
                got=", ".join(_kind(part) for part in parts) or "nothing",
                remedy=_SCALAR_REMEDY,
            )
        if len(parts) == 2 and not isinstance(parts[1], torch.Tensor):
            parts[1] = torch.full((), parts[1], dtype=torch.float64, device=parts[0].device)
        for part, what in zip(parts, ("loss", "loss's weight"), strict=False):
            if part.dim() != 0 or (what == "loss" and not part.is_floating_point()):
                place = (
                    location_of_function(function) or type(self.model if function is None else function).__qualname__
                )
                raise ModelError(
                    f"The {what} is not a scalar, at {place}",
                    expected="a 0-dimensional floating-point tensor",
                    got=_kind(part),
                    remedy=_SCALAR_REMEDY,
                )
        return [parts[0], *(part.detach() for part in parts[1:])]

    def _new_buffer(self, name: str, old: torch.Tensor) -> torch.Tensor:
        new = self.get_buffer(name)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ModelError(
                f"Buffer '{user_name(name)}' changes its shape or dtype in the forward pass",
                expected=_kind(old),
                got=_kind(new),
                remedy="keep the shape and dtype of buffers; for caches, make a new tensor in each call",
            )
        return new.detach().clone()


def _own_loss(output: Any) -> Any:
    """Find the loss in the output of a model that computes it itself."""
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    if not isinstance(output, torch.Tensor) and hasattr(output, "loss"):
        return output.loss
    return output


def _tensor_attributes(root: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that are plain attributes of modules: neither parameters nor buffers."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = tuple(int(getattr(getattr(size, "node", None), "hint", size)) for size in value.shape)
        return f"a tensor of shape {shape} and {value.dtype}"
    return type(value).__name__
