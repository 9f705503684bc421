"""Compares an exported program with the user's own model on a small batch: loss and every gradient.

The catch-all for whatever export may have dropped or built in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from gradwire.graph.batch import BatchLayout
from gradwire.graph.capture import Captured, set_mode
from gradwire.graph.copying import Loss, copy_model, is_on_meta
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
) -> None:
    """ModelError if the program's loss or gradients differ from the model's, in training mode.

    One row is tried first: a model that branches on a batch of one is found so. Some models cannot train on one row
    (batch normalisation): they are compared on more.
    """
    rows_given = [tensor.shape[0] for leaf, tensor in zip(batch.tensors, tensors, strict=True) if leaf.batched]
    most = max(2, min(4, rows_given[0]))
    for rows in (1, most):
        small = [
            _rows(tensor, rows) if leaf.batched else tensor for leaf, tensor in zip(batch.tensors, tensors, strict=True)
        ]
        copied, copied_loss = copy_model(model, loss, fresh_buffers=True)
        wrapper = Wrapper(copied, copied_loss, batch, with_loss=True, with_output=False)
        set_mode(wrapper, training=True)
        parameters = {name: item for name, item in wrapper.named_parameters() if item.requires_grad}
        try:
            expected = _run(wrapper, small, parameters)
        except ModelError:
            raise
        except Exception as error:
            if rows == most:
                raise ModelError(
                    "The model fails on the example, outside of export",
                    got=f"{type(error).__name__}: {error}",
                    remedy="make the model, loss and example run in plain torch first",
                ) from error
            continue
        got = _run(_program(captured, model, loss, batch, table), small, parameters)
        _compare(expected, got, rows)
        return


def _rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor[:rows] if tensor.shape[0] >= rows else torch.cat([tensor] * rows)[:rows]


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
) -> tuple[torch.Tensor, Gradients]:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        loss = call(*(tensor.clone() for tensor in tensors))[0]
        if not loss.requires_grad:
            return loss.detach(), dict.fromkeys(parameters)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), dict(zip(parameters, gradients, strict=True))


def _compare(expected: tuple[torch.Tensor, Gradients], got: tuple[torch.Tensor, Gradients], rows: int) -> None:
    (loss, gradients), (exported_loss, exported) = expected, got
    if not _close(loss, exported_loss, loss.abs().item()):
        raise _differs("The loss", f"{loss.item():.8g}", f"{exported_loss.item():.8g}", rows)
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
                raise _differs(f"The gradient of '{user_name(name)}'", told[0], told[1], rows)
        elif not _close(gradient, other, max(scales.get(name, 0.0), _NOISE * largest)):
            off = (_dense(gradient) - _dense(other)).abs().max().item()
            scale = scales.get(name, 0.0)
            raise _differs(f"The gradient of '{user_name(name)}'", f"largest {scale:.3g}", f"off by {off:.3g}", rows)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor


def _close(first: torch.Tensor, second: torch.Tensor, scale: float) -> bool:
    tolerance = _TOLERANCES.get(first.dtype, _COARSE)
    return torch.allclose(_dense(first), _dense(second), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _differs(what: str, eager: str, exported: str, rows: int) -> ModelError:
    return ModelError(
        f"{what} of the exported graph differs from the model's own, on {rows} row(s)",
        expected=eager,
        got=exported,
        remedy="look for code that export cannot see: branches on the number of rows, Python or NumPy randomness, "
        "state kept outside of buffers, gradients made by hand; if the model is right, pass check=False",
    )
