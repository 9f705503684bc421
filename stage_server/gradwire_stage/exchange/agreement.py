"""How a server agrees with others on what a training step has learned: what every way of it answers to.

The class here is the way of a server that has nobody to agree with; the others say what they do besides
(`agreements.py` chooses). A step calls `begin`, then `before` and `after` around each action of a micro-batch, then
what its program ends with: `reduce`, `before_update`, `gather`, `average`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.program import AVERAGE, GATHER, NORM, REDUCE, UPDATE, Action
from gradwire_protocol.v1 import run_pb2
from gradwire_stage.exchange.statistics import ReplicaBuffers
from gradwire_stage.optimizer import StateValue
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


@dataclass(frozen=True)
class StepEnd:
    """What must and may stand behind the micro-batches in a training step's program."""

    # Whether it cannot do without REDUCE, which tied copies need in any case.
    reduces: bool = False
    # Whether there is an optimizer here; otherwise parameter servers have it.
    updates: bool = True
    # Whether GATHER must follow, and whether AVERAGE may.
    gathers: bool = False
    averages: bool = False

    def allowed(self) -> list[list[str]]:
        """Return the kinds of actions, in order, that are right."""
        before = [[REDUCE]] if self.reduces else [[], [REDUCE]]
        if self.updates:
            before = [[*first, *norm, UPDATE] for first in before for norm in ([], [NORM])]
        behind: list[list[str]] = [[GATHER]] if self.gathers else [[], [AVERAGE]] if self.averages else [[]]
        return [[*first, *last] for first in before for last in behind]

    def __str__(self) -> str:
        words = ["REDUCE" if self.reduces else "REDUCE if need be"]
        words += ["NORM if need be", "UPDATE"] if self.updates else []
        words += ["GATHER"] if self.gathers else ["AVERAGE if need be"] if self.averages else []
        return ", ".join(words)


class Agreement:
    """Agrees with nobody. For the compute thread."""

    end = StepEnd()
    # Parameters of which the optimizer's state is spread over the replicas.
    shared: frozenset[str] = frozenset()
    # Whether something of each parameter is kept from step to step, by every replica, which `owed` gives.
    owes = False
    # Where replicas apply changes of buffers in the order of the whole step.
    buffers: ReplicaBuffers | None = None

    def __init__(self, run: RunState) -> None:
        self._run = run
        # What the optimizer of this server updates, by parameter: parameters, or parts of them.
        self.updated: dict[str, torch.Tensor] = dict(run.parameters)

    def begin(self, timeline: Timeline[Any], entry: int, step: run_pb2.TrainStep, program: Iterable[Action]) -> None:
        """A training step begins."""

    def before(self, action: Action) -> None:
        """An action of a micro-batch begins, which may add to gradients."""

    def left_to_add(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """The action that has begun adds to the gradients of these parameters only."""

    def added(self, parameter: torch.nn.Parameter) -> None:
        """It has added to this one's."""

    def after(self, action: Action) -> None:
        """An action of a micro-batch has ended."""

    def reduce(self) -> None:
        """Have what `updated` holds get the gradients of all replicas, where these agree on gradients."""

    def before_update(self) -> None:
        """The optimizer is about to run."""

    def gather(self) -> None:
        """Bring the weights to all who hold them."""

    def average(self) -> None:
        """Have replicas that have trained alone go on from the same weights."""

    def settle(self, timeline: Timeline[Any]) -> None:
        """Have all updates of the steps before: what follows reads weights and is no training step."""

    def whole_gradients(self) -> dict[str, torch.Tensor | None]:
        """Return the gradients, by parameter, of which there are only parts in `updated`."""
        return {}

    def counts(self, name: str) -> bool:
        """Whether what this server updates of a parameter is in its part of the norm."""
        return self._run.owns(name)

    def own_state(self, name: str, value: StateValue) -> StateValue | None:
        """Return what this server's optimizer keeps of a value of its state; None: nothing."""
        return value if name in self.updated else None

    def owed(self, name: str) -> dict[str, StateValue]:
        """Return what is kept of a parameter from step to step, for checkpoints."""
        return {}

    def takes(self, name: str, replica: int, what: str) -> bool:
        """Whether `owe` is to be given what `owed` gave of a parameter at a replica, under the name `what`."""
        return False

    def owe(self, states: Mapping[str, Mapping[str, StateValue]]) -> None:
        """Go on from what `owed` gave, by parameter. After `forget`, with weights and the optimizer's state loaded."""

    def forget(self) -> None:
        """Let go of what was kept from step to step: another state has been loaded."""

    def close(self) -> None:
        """Let go of all memory."""
        self.updated.clear()
