"""The state that one generation of a run leaves to the next, when another layout goes on with it.

It stays where it is: the next generation's tensors are the same objects. Leaves to others: when that happens
(service.py), and what moves between servers (takeover.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.torch_tensors import TORCH_TYPES
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_stage.optimizer import StateValue

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


@dataclass(frozen=True)
class KeptState:
    """What a server held: tensors and the optimizer's values by name, after so many training steps."""

    tensors: dict[str, torch.Tensor]
    states: dict[str, dict[str, StateValue]]
    weight_version: int

    @classmethod
    def of(cls, run: RunState) -> KeptState:
        """Return the state of a run that is between two entries."""
        states = {name: run.optimizer.state_of(name) for name in run.parameters}
        return cls(dict(run.tensors), {name: state for name, state in states.items() if state}, run.weight_version)

    def tensor(self, spec: graph_pb2.TensorSpec) -> torch.Tensor | None:
        """Return a tensor of the model; None if it was not here. FrameError if it was another."""
        tensor = self.tensors.get(spec.name)
        expected = (tuple(spec.shape), TORCH_TYPES[spec.data_type])
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) != expected:
            raise FrameError(
                f"The generation before had another tensor {spec.name!r}",
                expected=f"shape {list(spec.shape)}, {expected[1]}",
                got=f"shape {list(tensor.shape)}, {tensor.dtype}",
            )
        return tensor

    def state_names(self) -> list[run_pb2.OptimizerStateName]:
        """Return the names of all values of the optimizer's state."""
        return [
            run_pb2.OptimizerStateName(parameter=name, state=key)
            for name, state in self.states.items()
            for key in state
        ]
