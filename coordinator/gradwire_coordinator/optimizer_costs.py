"""What an optimizer's update takes, and what it keeps: by its kind, its settings, and the parameters that it names.

Pure. Estimates, of torch.optim's own implementations. Leaves to others: who holds a parameter (`segments.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from gradwire_coordinator.costs import Rates
from gradwire_protocol.exchange_state import ALONE, ExchangeState
from gradwire_protocol.optimizer_state import OptimizerState, StateBytes, tensor_bytes
from gradwire_protocol.v1 import graph_pb2, run_pb2

# Measured on a CPU: an update takes as long as copying the parameters so many times.
_COPIES, _COPIES_OF_SGD, _COPIES_OF_MOMENTUM = 20.0, 2.0, 3.0


class OptimizerCosts:
    """Of the optimizer of a run. A parameter that it does not name has no state, and is not updated."""

    def __init__(
        self,
        optimizer: run_pb2.Optimizer,
        sharers: int = 1,
        *,
        elsewhere: bool = False,
        exchange: ExchangeState = ALONE,
    ) -> None:
        """sharers: replicas among which its state is spread; each then updates a part only. elsewhere: on others.

        exchange: what is kept beside it to agree with other replicas.
        """
        self._state = OptimizerState(optimizer)
        self._sharers = sharers
        self._elsewhere = elsewhere
        self._exchange = exchange

    def held(self, tensors: Iterable[graph_pb2.TensorSpec]) -> StateBytes:
        """Return what holding these tensors takes."""
        held = self._state.held(tensors, self._sharers, self._exchange)
        return dataclasses.replace(held, optimizer=0) if self._elsewhere else held

    def update_seconds(self, tensors: Iterable[graph_pb2.TensorSpec], rates: Rates) -> float:
        """Return what updating these tensors takes."""
        if self._elsewhere:
            return 0.0
        copies = 0.0
        for spec in tensors:
            if spec.name in self._state.factors and spec.requires_grad:
                kept = self._state.factors[spec.name]
                of_sgd = _COPIES_OF_SGD + _COPIES_OF_MOMENTUM * kept
                copies += (of_sgd if self._state.name == "SGD" else _COPIES) * tensor_bytes(spec)
        return 2 * copies / rates.bytes_per_second / self._sharers
