"""What is wrong with a trainer's arguments, before anything is done with them."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradwire.plan import Plan
from gradwire_protocol.errors import ModelError, PlanError, SettingsError


def check_trainer_arguments(model: Any, plan: Any, seed: Any, max_grad_norm: Any, micro_batch_rows: Any) -> None:
    """ModelError, PlanError or SettingsError for the first argument that is not what it should be."""
    if not isinstance(model, nn.Module):
        raise ModelError("The model is not a module", expected="a torch.nn.Module", got=repr(type(model)))
    if not isinstance(plan, Plan):
        raise PlanError("The plan is not a plan", expected="gradwire.Plan(...)", got=repr(plan))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise SettingsError("seed is not valid", expected="a whole number, 0 to 2**63 − 1", got=repr(seed))
    if max_grad_norm is not None:
        number = isinstance(max_grad_norm, int | float) and not isinstance(max_grad_norm, bool)
        if not number or not max_grad_norm > 0:
            raise SettingsError("max_grad_norm is not valid", expected="a number above 0", got=repr(max_grad_norm))
    if micro_batch_rows is not None and (
        isinstance(micro_batch_rows, bool) or not isinstance(micro_batch_rows, int) or micro_batch_rows < 1
    ):
        raise SettingsError(
            "micro_batch_rows is not valid", expected="a whole number above 0, or None", got=repr(micro_batch_rows)
        )
