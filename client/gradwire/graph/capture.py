"""Runs torch.export on a copy of the model with its loss, and turns its failures into errors with a remedy.

Leaves the exported program as torch made it: training IR, regions not yet inlined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from gradwire.graph.batch import BatchLayout
from gradwire.graph.copying import Loss, copy_model
from gradwire.graph.quiet import quiet
from gradwire.graph.refusals import record_fixed_sizes, refuse_silent_losses, trace_data_attribute
from gradwire.graph.source import Location, location_of_traceback
from gradwire.graph.wrapper import OutputLayout, Wrapper
from gradwire_protocol.errors import ModelError


@dataclass(frozen=True)
class Captured:
    """An exported program, with what its outputs mean."""

    program: ExportedProgram
    outputs: OutputLayout


def capture(
    model: nn.Module,
    loss: Loss,
    batch: BatchLayout,
    tensors: Sequence[torch.Tensor],
    *,
    training: bool,
    with_loss: bool = True,
    with_output: bool = False,
) -> Captured:
    """Export the model in training or evaluation mode. Batched inputs have a dynamic dimension 0."""
    copied, copied_loss = copy_model(model, loss)
    wrapper = Wrapper(copied, copied_loss, batch, with_loss=with_loss, with_output=with_output)
    set_mode(wrapper, training)
    modules = {id(module): name for name, module in wrapper.named_modules()}
    rows = Dim("rows", min=1)
    leaves = [leaf for leaf in batch.tensors if with_loss or not leaf.is_target]
    examples = [
        _two_rows(tensor) if leaf.batched else tensor
        for leaf, tensor in zip(batch.tensors, tensors, strict=True)
        if leaf in leaves
    ]
    shapes = tuple({0: rows} if leaf.batched else None for leaf in leaves)
    fixed: list[Location] = []
    try:
        with (
            quiet(),
            torch.enable_grad(),
            record_fixed_sizes(modules) as fixed,
            refuse_silent_losses(modules),
            trace_data_attribute(),
        ):
            program = export(wrapper, tuple(examples), dynamic_shapes={"tensors": shapes}, strict=False)
    except ModelError:
        raise
    except Exception as error:
        raise _translated(error, location_of_traceback(error.__traceback__, modules), fixed) from error
    return Captured(program, wrapper.outputs)


def set_mode(wrapper: Wrapper, training: bool) -> None:
    """Set modes. In training, submodules that the user froze with eval() stay so, if the model itself trains."""
    if not training:
        wrapper.eval()
    elif not wrapper.model.training:
        wrapper.train()


def _two_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Export specialises on a size of 1."""
    return tensor if tensor.shape[0] > 1 else torch.cat([tensor, tensor])


def _translated(error: Exception, where: Location, fixed: Sequence[Location]) -> ModelError:
    """Say what in the user's model stands against export, and what to do."""
    first_line = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in first_line.lower():
        return ModelError(
            f"Control flow or a size depends on the data of a tensor, at {where}",
            expected="operators and shapes that are the same for every batch",
            got=first_line,
            remedy="use torch.where or a mask instead of `if`, and avoid .item() and .tolist() in the forward pass",
        )
    if isinstance(error, UserError) and "Constraints violated" in first_line:
        reasons = [line.strip() for line in str(error).split("\n")[1:] if line.strip().startswith("- ")]
        return ModelError(
            f"The model works for some numbers of rows only, at {fixed[0] if fixed else where}",
            expected="a forward pass for any number of rows in dimension 0",
            got=reasons[0].removeprefix("- ").split(". If")[0][:200] if reasons else first_line,
            remedy="do not convert x.shape[0] to a number (int, float, range, if); use tensor operators on it, "
            "-1 in view, or mark inputs that are not batched with gradwire.unbatched(...)",
        )
    return ModelError(
        f"torch.export cannot capture the model, at {where}",
        got=f"{type(error).__name__}: {first_line}",
        remedy="see the chained exception; code that torch cannot trace must move out of the forward pass",
    )
