"""Linear layers that say how tensor-parallel servers split them (Megatron-LM, Shoeybi et al. 2019).

In one process they are `torch.nn.Linear`, so that a model with them runs, exports and verifies as it is. With
Plan(tensor=…) what they say comes before the plan's own rules. Leaves splitting to the coordinator, and rules by name
to tensor_plans.py.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import nn

from gradwire.graph.tensors import LOSS_PREFIX
from gradwire.tensor_plans import COLUMN, ROW, Rule


class ColumnParallelLinear(nn.Linear):
    """A linear layer that servers split by its outputs: columns of A in Y = X A, as the paper writes it.

    Each server has the whole of the input, (…, in_features), and makes its own part of the outputs, (…, out_features ÷
    servers), without a word to the others, bias included. What follows works on parts, as an activation or the heads of
    an attention can, until a `RowParallelLinear` takes them in; elsewhere the parts are brought together.
    torch.nn.Linear keeps its weight as (out_features, in_features), so that its rows are what is split.
    """

    split: ClassVar[str] = COLUMN


class RowParallelLinear(nn.Linear):
    """A linear layer that servers split by its inputs: rows of A in Y = X A, as the paper writes it.

    Each server has a part of the inputs, (…, in_features ÷ servers), and makes a summand of every output, (…,
    out_features); the servers add these up, and the bias once. Behind a `ColumnParallelLinear` the parts of the input
    are there already, and the sum is the only exchange of both. The textbook sample that scatters the columns of the
    input over the processes, multiplies, and sums the results with an all-reduce, is this layer, though often called
    column parallelism: it is the input that is split there, and with it the rows of A.
    """

    split: ClassVar[str] = ROW


def module_rules(model: nn.Module, loss: Callable[..., Any] | nn.Module | None) -> list[Rule]:
    """Return a rule for the weight of each such layer, of the model and of a loss that is a module."""
    rules = list(_rules(model, ""))
    return [*rules, *_rules(loss, LOSS_PREFIX)] if isinstance(loss, nn.Module) else rules


def _rules(root: nn.Module, prefix: str) -> Iterator[Rule]:
    for path, module in root.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            name = f"{path}.weight" if path else "weight"
            # Module names may have characters that patterns give a meaning.
            yield glob.escape(prefix + name), module.split
