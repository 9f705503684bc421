"""Compares an exported program with the user's own model on a small batch: loss and every gradient.

The catch-all for whatever export may have dropped or built in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from gradwire.graph.batch import BatchLayout, Leaf, take_rows
from gradwire.graph.capture import Captured, set_mode
from gradwire.graph.copying import Loss, copy_model, is_on_meta
from gradwire.graph.dynamic import smallest, with_size
from gradwire.graph.precision import autocast
from gradwire.graph.source import user_name
from gradwire.graph.tensors import TensorTable
from gradwire.graph.wrapper import Wrapper
from gradwire_protocol.errors import ModelError

# Above this many parameters the comparison costs more time and memory than it is worth.
MAX_PARAMETERS = 50_000_000
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE = 3e-2
# Gradients far below the largest one are noise: they are compared on this share of its scale.
_NOISE = 1e-3

Gradients = Mapping[str, torch.Tensor | None]


def can_compare(model: nn.Module) -> bool:
    """Whether the model has data, and is small enough to run here."""
    return not is_on_meta(model) and sum(parameter.numel() for parameter in model.parameters()) <= MAX_PARAMETERS


def compare_with_eager(
    model: nn.Module,
    loss: Loss,
    batch: BatchLayout,
    tensors: Sequence[torch.Tensor],
    captured: Captured,
    table: TensorTable,
    precision: torch.dtype | None = None,
) -> Captured:
    """ModelError if the program's loss or gradients differ from the model's, in training mode.

    One row, and the smallest sizes of dynamic dimensions, are tried first: a model that branches on a batch of one is
    found so. Some models cannot train on these (batch normalisation): they are compared on more. Single sizes that
    export excluded are tried too; returned is the program with those that turned out to be right.
    """
    fixed = batch.micro_batch_rows
    most = fixed or max(2, min(4, batch.rows))
    whole = (most, dict(batch.example_sizes))
    low = smallest(captured.sizes)

    def equal_on(rows: int, sizes: Mapping[str, int]) -> bool:
        """Compare; False if the model itself fails on such a batch, or has no loss there."""
        small = [
            _resized(take_rows(tensor, rows) if leaf.batched else tensor, leaf, sizes)
            for leaf, tensor in zip(batch.tensors, tensors, strict=True)
        ]
        copied, copied_loss = copy_model(model, loss, fresh_buffers=True)
        wrapper = Wrapper(copied, copied_loss, batch, with_loss=True, with_output=False)
        set_mode(wrapper, training=True)
        parameters = {name: item for name, item in wrapper.named_parameters() if item.requires_grad}
        try:
            expected = _run(wrapper, small, parameters, autocast(precision, model))
        except ModelError:
            raise
        except Exception as error:
            if (rows, sizes) == whole:
                raise ModelError(
                    "The model fails on the example, outside of export",
                    got=f"{type(error).__name__}: {error}",
                    remedy="make the model, loss and example run in plain torch first",
                ) from error
            return False
        if not bool(expected[0].isfinite()):  # such as a mean over no target that counts: it tells nothing
            return (rows, sizes) == whole
        program = _program(captured, model, loss, batch, table)
        got = _run(program, small, parameters, autocast(precision, model))
        _compare(expected, got, _described(rows, sizes))
        return True

    for rows, tried in ((fixed or 1, low), (fixed or 1, whole[1]), whole):
        if equal_on(rows, tried):
            break

    def is_right(name: str, value: int) -> bool:
        """Whether a size that export excluded is right all the same."""
        try:
            return equal_on(most, with_size(captured.sizes, whole[1], name, value))
        except ModelError:
            return False

    sizes = {
        name: replace(size, excluded=frozenset(value for value in size.excluded if not is_right(name, value)))
        for name, size in captured.sizes.items()
    }
    return replace(captured, sizes=sizes)


def _resized(tensor: torch.Tensor, leaf: Leaf, sizes: Mapping[str, int]) -> torch.Tensor:
    """Repeat or cut a tensor in its dynamic dimensions, to these sizes."""
    for dimension, name in leaf.dims:
        indices = torch.arange(sizes[name], device=tensor.device) % tensor.shape[dimension]
        tensor = tensor.index_select(dimension, indices)
    return tensor


def _program(
    captured: Captured, model: nn.Module, loss: Loss, batch: BatchLayout, table: TensorTable
) -> Callable[..., Sequence[torch.Tensor]]:
    """Return the traced program as a function of the batch, with fresh copies of all that it may write to."""
    program = captured.program
    copied, copied_loss = copy_model(model, loss, fresh_buffers=True)
    state = Wrapper(copied, copied_loss, batch, with_loss=True, with_output=False)
    named: dict[str, torch.Tensor] = {
        **dict(state.named_parameters(remove_duplicate=False)),
        **dict(state.named_buffers(remove_duplicate=False)),
    }

    def call(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        remaining = iter(tensors)
        arguments = []
        for item in program.graph_signature.input_specs:
            if item.kind is InputKind.USER_INPUT:
                arguments.append(next(remaining))
            elif item.kind is InputKind.CONSTANT_TENSOR:
                constant = table.tensors[table.constant(str(item.target), program.constants[str(item.target)])]
                arguments.append(constant if isinstance(constant, nn.Parameter) else constant.clone())
            else:
                arguments.append(named[str(item.target)])
        outputs: Sequence[torch.Tensor] = program.graph_module(*arguments)
        return outputs

    return call


def _run(
    call: Callable[..., Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    around: torch.autocast,
) -> tuple[torch.Tensor, Gradients]:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        with around:
            loss = call(*(tensor.clone() for tensor in tensors))[0]
        if not loss.requires_grad:
            return loss.detach(), dict.fromkeys(parameters)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def _compare(expected: tuple[torch.Tensor, Gradients], got: tuple[torch.Tensor, Gradients], batch: str) -> None:
    (loss, gradients), (exported_loss, exported) = expected, got
    if not _close(loss, exported_loss, loss.abs().item()):
        raise _differs("The loss", f"{loss.item():.8g}", f"{exported_loss.item():.8g}", batch)
    scales = {
        name: gradient.abs().max().item()
        for name, gradient in gradients.items()
        if gradient is not None and gradient.numel() > 0
    }
    largest = max(scales.values(), default=0.0)
    for name, gradient in gradients.items():
        other = exported[name]
        if gradient is None or other is None:
            if gradient is not other:
                told = ["no gradient" if item is None else "a gradient" for item in (gradient, other)]
                raise _differs(f"The gradient of '{user_name(name)}'", told[0], told[1], batch)
        elif not _close(gradient, other, max(scales.get(name, 0.0), _NOISE * largest)):
            off = (_dense(gradient) - _dense(other)).abs().max().item()
            scale = scales.get(name, 0.0)
            raise _differs(f"The gradient of '{user_name(name)}'", f"largest {scale:.3g}", f"off by {off:.3g}", batch)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def _close(first: torch.Tensor, second: torch.Tensor, scale: float) -> bool:
    tolerance = _TOLERANCES.get(first.dtype, _COARSE)
    return torch.allclose(_dense(first), _dense(second), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _described(rows: int, sizes: Mapping[str, int]) -> str:
    return ", ".join([f"{rows} row(s)", *(f"{name} {size}" for name, size in sizes.items())])


def _differs(what: str, eager: str, exported: str, batch: str) -> ModelError:
    return ModelError(
        f"{what} of the exported graph differs from the model's own, on {batch}",
        expected=eager,
        got=exported,
        remedy="look for code that export cannot see: branches on the number of rows or a length, Python or NumPy "
        "randomness, state kept outside of buffers, gradients made by hand; if the model is right, pass check=False",
    )
