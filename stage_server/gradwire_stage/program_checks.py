"""Checks the program of an entry: that it does all that the entry needs, once, and nothing before its time.

What else a request to execute holds is checked in checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, FORWARD, INPUT_GRADIENT, OF_MICRO_BATCH, WEIGHT_GRADIENT, Action
from gradwire_stage.exchange.agreement import StepEnd

# What happens to a micro-batch on a stage, in order.
_WAYS = ((FORWARD, BACKWARD), (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT))


def check_program(
    program: Sequence[Action], stages: Sequence[int], micro_batches: list[int], *, end: StepEnd | None
) -> None:
    """Refuse a program that misses or repeats something for a stage's micro-batch, or has it in a wrong order.

    end: what stands behind the micro-batches of a training step; None: it only goes forward.
    """
    parts = [action for action in program if action.kind in OF_MICRO_BATCH]
    behind = [action.kind for action in program[len(parts) :]]
    done: dict[tuple[int, int], tuple[str, ...]] = {}
    for stage, kind, micro_batch in parts:
        done[stage, micro_batch] = (*done.get((stage, micro_batch), ()), kind)
    if (
        done.keys() != {(stage, index) for stage in stages for index in micro_batches}
        or not all(way in ((FORWARD,),) if end is None else way in _WAYS for way in done.values())
        or behind not in ([[]] if end is None else end.allowed())
    ):
        needed = "F only" if end is None else f"F, then B, or I and later W; behind all of them {end}"
        raise PlanError(
            "A program does not do what its entry needs",
            expected=f"for each of stages {list(stages)} and each of {len(micro_batches)} micro-batches {needed}",
            got=" ".join(map(str, program))[:500],
        )
