"""The user's model as a run has trained it so far, to be run in this process beside the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gradwire_protocol.errors import ModelError


def present_model(model: nn.Module | None, state: Callable[[], Mapping[str, Any]]) -> nn.Module:
    """Return a copy of the model with the present state, which is asked for only if there is a model to take it.

    ModelError if there is none any more, or if it is on the meta device.
    """
    if model is None:
        raise ModelError(
            "The model is gone: nothing refers to it any more",
            expected="the model that the trainer was made with, which is run in this process",
            remedy="keep a variable that refers to it, or call gradwire.verify with a model",
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "The model cannot be run in this process: it is on the meta device",
            expected="a model with its tensors in memory",
            remedy="verify a smaller model of the same kind with gradwire.verify",
        )
    present = copy.deepcopy(model)
    present.load_state_dict(state())
    return present
