"""Checks the program of an entry: that it does all that the entry needs, once, and nothing before its time.

What else a request to execute holds is checked in checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NORM,
    OF_MICRO_BATCH,
    REDUCE,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
)

# What happens to a micro-batch on a stage, in order, and to the step as a whole behind it.
_WAYS = ((FORWARD, BACKWARD), (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT))
_ENDS = ([UPDATE], [REDUCE, UPDATE], [NORM, UPDATE], [REDUCE, NORM, UPDATE])


def check_program(program: Sequence[Action], stages: Sequence[int], micro_batches: list[int], *, train: bool) -> None:
    """Refuse a program that misses or repeats something for a stage's micro-batch, or has it in a wrong order."""
    parts = [action for action in program if action.kind in OF_MICRO_BATCH]
    end = [action.kind for action in program[len(parts) :]]
    done: dict[tuple[int, int], tuple[str, ...]] = {}
    for stage, kind, micro_batch in parts:
        done[stage, micro_batch] = (*done.get((stage, micro_batch), ()), kind)
    if (
        done.keys() != {(stage, index) for stage in stages for index in micro_batches}
        or not all(way in (_WAYS if train else ((FORWARD,),)) for way in done.values())
        or end not in (_ENDS if train else ([],))
    ):
        needed = "F, then B, or I and later W; behind all of them REDUCE, NORM, UPDATE as needed" if train else "F only"
        raise PlanError(
            "A program does not do what its entry needs",
            expected=f"for each of stages {list(stages)} and each of {len(micro_batches)} micro-batches {needed}",
            got=" ".join(map(str, program))[:500],
        )
