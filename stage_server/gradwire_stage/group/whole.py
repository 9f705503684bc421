"""Brings the parts of the model's tensors together at one shard, for the client and for checkpoints.

All shards of a group take part, with the same tensors in the same order. Leaves to others: the state that replicas
share (`exchange/state.py`), which is brought together before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.torch_tensors import dense
from gradwire_stage.exchange.collectives import Group, Steps, gather_when_asked
from gradwire_stage.group.parts import is_part, joined
from gradwire_stage.group.tensor_group import TensorGroup
from gradwire_stage.optimizer import StateValue
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


class WholeTensors:
    """Whole tensors in one entry. about: what they are for, which nothing else in the entry is."""

    def __init__(self, run: RunState, timeline: Timeline[Any], entry: int, about: str) -> None:
        self._run = run
        self._group = TensorGroup(run, timeline, entry=entry, micro_batch=0, about=about)

    def of(self, name: str, tensor: torch.Tensor, what: str = "") -> torch.Tensor:
        """Return the whole of a tensor of the model, or of something with its shape, at the shard that speaks.

        At the others, and of what is not split: the tensor itself. what: tells several of one name apart.
        """
        spec = self._run.placements[name].spec
        if self._group.size == 1 or not is_part(spec, tensor):
            return tensor
        # Copied: it may be updated while it is still on its way.
        own = tensor if self._run.places.speaks else dense(tensor.detach()).clone()
        root = min(self._run.places.group_servers)

        def gather(group: Group) -> Steps[list[torch.Tensor] | None]:
            return gather_when_asked(group, own.detach(), root)

        parts = self._group.run(f"{name}/{what}", gather)
        return tensor if parts is None else joined(parts, spec.split.dimension, spec.split.sections)

    def of_state(self, name: str, state: str, value: StateValue) -> StateValue:
        """Return the whole of a value of the optimizer's state likewise."""
        return self.of(name, value, state) if isinstance(value, torch.Tensor) else value
