"""Runs a group of nodes as the executor would: what forward, I and W take, and what is kept between them.

Leaves to others: which groups there are, and on what values (`profiling.py`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradwire_protocol.v1 import stage_pb2
from gradwire_stage.group.tensor_group import LoneGroup
from gradwire_stage.profiling_actions import empty_stage
from gradwire_stage.profiling_held import Kept, SavedStorages, kept_of
from gradwire_stage.segment import BuiltSegment, Value
from gradwire_stage.timeline import Clock

# The median counts: in a run, too, others share the caches. It is trusted when so many runs are within this of the
# fastest.
_AGREEING_RUNS = 4
_AGREEMENT = 1.05
_MOST_RUNS = 50
# Of the group that does nothing, however slow the machine is just then: what it takes is taken off every other.
_FEWEST_EMPTY_RUNS = 9


@dataclass(frozen=True)
class Measured:
    """What a group takes, in seconds; what it gave; and what it keeps."""

    forward: float
    input_gradient: float
    weight_gradient: float
    kept: Kept
    outgoing: tuple[Value, ...]


class GroupRunner:
    """Runs groups on a device, with one precision. For the thread that may compute there."""

    def __init__(
        self,
        device: torch.device,
        clock: Clock[Any],
        precision: torch.dtype | None,
        operators: Mapping[str, Callable[..., Any]],
        shards: int = 1,
    ) -> None:
        """shards: servers that run the groups together. This one is alone, and makes up what the others would have."""
        self._shards = shards
        self._device = device
        self._clock = clock
        self._precision = precision
        self._operators = operators
        # By whether gradients flow through it: recording for them is half of what an empty group takes.
        self._overhead = dict.fromkeys((False, True), (0.0, 0.0, 0.0))
        self._overhead = {flows: self._measure_overhead(flows) for flows in (False, True)}

    def run(
        self,
        segment: stage_pb2.Segment,
        tensors: dict[str, torch.Tensor],
        incoming: Sequence[Value],
        *,
        until: float,
        fewest_runs: int = 1,
    ) -> Measured:
        """Run a group on these values, until this time (time.perf_counter), but so often in any case."""
        built = BuiltSegment(segment, tensors, self._device, 0, self._precision, self._operators, self._shards)
        together = LoneGroup(self._shards)
        values = {item.value: value for item, value in zip(segment.incoming, incoming, strict=True)}
        relayed = {
            item.value: torch.ones_like(value)
            for item in segment.incoming
            if item.HasField("gradient_from_stage")
            and isinstance(value := values[item.value], torch.Tensor)
            and value.requires_grad
        }
        clock = self._clock
        saved = SavedStorages()
        first = clock.mark()
        with saved.recording():
            made = built.forward(values, step=0, micro_batch=0, record=True, group=together)
        outgoing = tuple(made.outgoing.values())
        kept = kept_of(saved, incoming, outgoing, tensors.values())
        gradients = {
            name: torch.ones_like(value)
            for name, value in made.outgoing.items()
            if isinstance(value, torch.Tensor) and value.requires_grad
        }
        given = tuple(_passed_on(value) for value in outgoing)
        del outgoing
        runs = []
        marks = [first, clock.mark()]
        while True:
            made.backward_input(gradients, relayed, None)
            marks.append(clock.mark())
            made.backward_weight()
            marks.append(clock.mark())
            runs.append(clock.elapsed(marks))
            if len(runs) >= fewest_runs and (time.perf_counter() >= until or _is_settled(runs[1:])):
                break
            marks = [clock.mark()]
            made = built.forward(values, step=0, micro_batch=0, record=True, group=together)
            marks.append(clock.mark())
        # The first touches new memory, and chooses kernels.
        usual = [statistics.median(times) * 1e-9 for times in zip(*(runs[1:] or runs), strict=True)]
        flows = any(isinstance(value, torch.Tensor) and value.requires_grad for value in incoming)
        forward, input_gradient, weight_gradient = (
            max(0.0, seconds - overhead) for seconds, overhead in zip(usual, self._overhead[flows], strict=True)
        )
        return Measured(forward, input_gradient, weight_gradient, kept, given)

    def _measure_overhead(self, flows: bool) -> tuple[float, float, float]:
        """Return what it takes to run a group that does nothing: whole stages have that once, not once a group."""
        value = torch.ones(1, device=self._device, requires_grad=flows)
        until = time.perf_counter() + 0.02
        found = self.run(empty_stage(), {}, [value], until=until, fewest_runs=_FEWEST_EMPTY_RUNS)
        return found.forward, found.input_gradient, found.weight_gradient


def _is_settled(runs: Sequence[Sequence[int]]) -> bool:
    totals = sorted(map(sum, runs))
    if len(totals) < _AGREEING_RUNS:
        return False
    return totals[_AGREEING_RUNS - 1] <= _AGREEMENT * totals[0] or len(totals) >= _MOST_RUNS


def _passed_on(value: Value) -> Value:
    """Return a value as the next group gets it from another stage."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
