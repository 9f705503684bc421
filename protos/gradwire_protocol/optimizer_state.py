"""What an optimizer keeps for each parameter, in bytes: by its kind and settings. Pure.

Planning counts with it, and stage servers check with it, so that what a plan says fits is not refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gradwire_protocol.exchange_state import ALONE, ExchangeState
from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.v1 import graph_pb2, run_pb2

# Of torch.optim: bytes of state for each byte of a parameter.
STATE_FACTORS = {
    "ASGD": 1,
    "Adadelta": 2,
    "Adafactor": 1,  # at most: two vectors for each matrix
    "Adagrad": 1,
    "Adam": 2,
    "AdamW": 2,
    "Adamax": 2,
    "Muon": 1,
    "NAdam": 2,
    "RAdam": 2,
    "RMSprop": 1,
    "Rprop": 2,
    "SGD": 0,
}
# Of one that is not known here.
_MOST_STATE = 3
# Settings that add as many bytes again, where they are on.
_MORE_STATE = ("amsgrad", "momentum", "centered")
_MOMENTUM_OF_ITS_OWN = frozenset({"Muon"})
# These look at whole matrices; all others at each element for itself.
NEED_WHOLE_PARAMETERS = frozenset({"Adafactor", "Muon"})


@dataclass(frozen=True)
class StateBytes:
    """What a server holds for its tensors, in bytes."""

    weights: int
    # And what replicas keep beside them to agree on them.
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


class OptimizerState:
    """Of the optimizer of a run. A parameter that it does not name has no state."""

    def __init__(self, optimizer: run_pb2.Optimizer) -> None:
        self.name = optimizer.name
        # By parameter: bytes of state for each of its bytes.
        self.factors: dict[str, int] = {}
        for group in optimizer.groups:
            on = {setting.name for setting in group.settings if _is_on(setting.value)}
            more = 0 if optimizer.name in _MOMENTUM_OF_ITS_OWN else len(on.intersection(_MORE_STATE))
            factor = STATE_FACTORS.get(optimizer.name, _MOST_STATE) + more
            self.factors.update(dict.fromkeys(group.parameters, factor))

    def held(
        self, tensors: Iterable[graph_pb2.TensorSpec], sharers: int = 1, exchange: ExchangeState = ALONE
    ) -> StateBytes:
        """Return what holding these tensors takes, where so many replicas share the optimizer's state."""
        weights = gradients = state = 0
        for spec in tensors:
            size = tensor_bytes(spec)
            weights += size
            if spec.requires_grad:
                gradients += size + exchange.bytes_for(spec)
                state += -(-size * self.factors.get(spec.name, 0) // sharers)
        return StateBytes(weights, gradients, state)


def tensor_bytes(spec: graph_pb2.TensorSpec) -> int:
    """Return the bytes of a tensor's elements."""
    return math.prod(spec.shape) * ELEMENT_BYTES[spec.data_type]


def _is_on(value: graph_pb2.Argument) -> bool:
    match value.WhichOneof("kind"):
        case "boolean":
            return value.boolean
        case "integer":
            return value.integer != 0
        case "real":
            return value.real != 0
    return False
