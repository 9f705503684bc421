"""Precision of a run: which may be asked for, and the context that stands for it in this process.

"bf16" means torch's autocast to bfloat16 around model and loss, and nothing around the backward pass, as one process
would do it. Parameters, their gradients and the optimizer keep the parameters' own type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradwire_protocol.errors import PlanError

_REMEDY = 'use precision="bf16", or leave precision out'


def precision_type(precision: Any, model: nn.Module) -> torch.dtype | None:
    """Return the type that autocast takes for a precision; None: no autocast. PlanError for what cannot be had."""
    if precision is None:
        return None
    if precision == "fp16":
        raise PlanError(
            'precision="fp16" cannot be carried out',
            expected='None, the parameters\' own data type, or "bf16"',
            got="fp16, whose small gradients become 0 unless the loss is scaled; a step whose scaled gradients "
            "overflow would have to be skipped by all servers together, which they have no way to agree on",
            remedy='use precision="bf16": it has the range of float32, and needs no scaling',
        )
    if precision != "bf16":
        raise PlanError(
            "precision is not valid",
            expected='None, the parameters\' own data type, or "bf16"',
            got=repr(precision),
            remedy=_REMEDY,
        )
    types = {parameter.dtype for parameter in model.parameters()}
    if torch.float32 not in types:
        raise PlanError(
            'precision="bf16" would change nothing: autocast converts float32 only',
            expected="a model with parameters in float32",
            got=", ".join(sorted(map(str, types))) or "no parameters",
            remedy="convert the model with model.float(), or leave precision out",
        )
    return torch.bfloat16


def autocast(precision: torch.dtype | None, model: nn.Module) -> torch.autocast:
    """Return the context in which model and loss run, on the kind of device that the model is on."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    return torch.autocast("cuda" if "cuda" in kinds else "cpu", dtype=precision, enabled=precision is not None)
