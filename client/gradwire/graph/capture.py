"""Runs torch.export on a copy of the model with its loss, and turns its failures into errors with a remedy.

Leaves the exported program as torch made it: training IR, regions not yet inlined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram, export
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from gradwire.graph.batch import BatchLayout, Leaf
from gradwire.graph.copying import Loss, copy_model
from gradwire.graph.dynamic import ROWS, Size, take_sizes
from gradwire.graph.quiet import quiet
from gradwire.graph.refusals import (
    known_obstacle,
    record_fixed_sizes,
    refuse_silent_losses,
    take_masks_as_given,
    trace_data_attribute,
)
from gradwire.graph.source import Location, location_of_traceback
from gradwire.graph.wrapper import OutputLayout, Wrapper
from gradwire_protocol.errors import InternalError, ModelError


@dataclass(frozen=True)
class Captured:
    """An exported program, with what its outputs mean."""

    program: ExportedProgram
    outputs: OutputLayout
    sizes: dict[str, Size]  # which the program takes, by name of the dynamic dimension


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
    """Export the model in training or evaluation mode.

    Batched inputs have a dynamic dimension 0, unless all micro-batches have the same number of rows.
    """
    copied, copied_loss = copy_model(model, loss)
    wrapper = Wrapper(copied, copied_loss, batch, with_loss=with_loss, with_output=with_output)
    set_mode(wrapper, training)
    modules = {id(module): name for name, module in wrapper.named_modules()}
    dims = {**({ROWS: Dim(ROWS, min=1)} if batch.micro_batch_rows is None else {}), **batch.dims}
    leaves = [leaf for leaf in batch.tensors if with_loss or not leaf.is_target]
    examples = [
        _two_rows(tensor) if leaf.batched and batch.micro_batch_rows is None else tensor
        for leaf, tensor in zip(batch.tensors, tensors, strict=True)
        if leaf in leaves
    ]
    shapes = tuple(_dynamic(leaf, dims) for leaf in leaves)
    fixed: list[Location] = []
    try:
        with (
            quiet(),
            torch.enable_grad(),
            record_fixed_sizes(modules) as fixed,
            refuse_silent_losses(modules),
            trace_data_attribute(),
            take_masks_as_given(),
        ):
            program = _export(wrapper, tuple(examples), shapes, fixed)
    except ModelError:
        raise
    except Exception as error:
        raise _translated(error, location_of_traceback(error.__traceback__, modules), fixed) from error
    symbolic = (node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    measured = [
        (name, value.shape[dimension], batch.example_sizes[name])
        for leaf, value in zip(leaves, symbolic, strict=True)
        for dimension, name in leaf.dims
    ]
    return Captured(program, wrapper.outputs, take_sizes(program, measured))


def _dynamic(leaf: Leaf, dims: Mapping[str, Any]) -> dict[int, Any] | None:
    named = {dimension: dims[name] for dimension, name in leaf.dims}
    return {**({0: dims[ROWS]} if leaf.batched and ROWS in dims else {}), **named} or None


def _export(
    wrapper: Wrapper, examples: tuple[torch.Tensor, ...], shapes: tuple[Any, ...], fixed: list[Location]
) -> ExportedProgram:
    """Export; where the model takes some sizes of a named dimension only, export again for these."""
    for defer in (False, False, True):
        # Deferred: single sizes that stay excluded, such as a length at which a slice is the whole, become assertions
        # in the graph instead of errors.
        try:
            return export(
                wrapper,
                examples,
                dynamic_shapes={"tensors": shapes},
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=defer,
            )
        except UserError as error:
            refined = None if defer else _refined(error, shapes)
            if refined is None:
                raise
            shapes = refined
            del fixed[:]
    raise InternalError("An export neither succeeded nor failed")


def _refined(error: UserError, shapes: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The shapes with bounds and multiples as torch suggests them; None if the rows, or a name, would be fixed."""
    message = str(error).split("\n\nThe error above")[0]
    if "Constraints violated" not in message or not any(set(shape or ()) - {0} for shape in shapes):
        return None
    if "Suggested fixes" not in message:
        return shapes
    (refined,) = refine_dynamic_shapes_from_suggested_fixes(message, {"tensors": shapes}).values()  # type: ignore[union-attr]
    for old, new in zip(shapes, refined, strict=True):
        for dimension, dim in (old or {}).items():
            if isinstance(new[dimension], int) or (dim.__name__ == ROWS and new[dimension] is not dim):
                return None
    return tuple(refined)


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
    known = known_obstacle(str(error))
    if known is not None:
        return ModelError(
            f"{known[0]} cannot be exported, at {where}",
            expected="operators that torch.export can trace, with gradients",
            got=f"{type(error).__name__}: {first_line}",
            remedy=known[1],
        )
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in first_line.lower():
        return ModelError(
            f"Control flow or a size depends on the data of a tensor, at {where}",
            expected="operators and shapes that are the same for every batch",
            got=first_line,
            remedy="use torch.where or a mask instead of `if`, and avoid .item() and .tolist() in the forward pass",
        )
    if isinstance(error, UserError) and "Constraints violated" in first_line:
        names = [name.strip() for name in first_line.partition("(")[2].partition(")")[0].split(",")]
        named = " and ".join(f"'{name}'" for name in names if name != ROWS)
        reasons = [line.strip() for line in str(error).split("\n")[1:] if line.strip().startswith("- ")]
        return ModelError(
            f"The model works for some {f'sizes of {named}' if named else 'numbers of rows'} only, "
            f"at {fixed[0] if fixed else where}",
            expected=f"a forward pass for any {f'size of {named}' if named else 'number of rows in dimension 0'}",
            got=reasons[0].removeprefix("- ").split(". If")[0][:200] if reasons else first_line,
            remedy="leave that dimension out of `dynamic`, and pad batches to one size; or do not convert the size to "
            "a number, nor compare it with one, in the forward pass"
            if named
            else "do not convert x.shape[0] to a number (int, float, range, if); use tensor operators on it, "
            "-1 in view, or mark inputs that are not batched with gradwire.unbatched(...); or give all "
            "micro-batches the same number of rows: micro_batch_rows=…",
        )
    return ModelError(
        f"torch.export cannot capture the model, at {where}",
        got=f"{type(error).__name__}: {first_line}",
        remedy="see the chained exception; code that torch cannot trace must move out of the forward pass",
    )
