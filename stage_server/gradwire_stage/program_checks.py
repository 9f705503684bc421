"""Checks the program of an entry: that it does all that the entry needs, once, and nothing before its time.

What else a request to execute holds is checked in checks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import (
    AVERAGE,
    BACKWARD,
    FORWARD,
    GATHER,
    INPUT_GRADIENT,
    NORM,
    OF_MICRO_BATCH,
    REDUCE,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
)

# What happens to a micro-batch on a stage, in order.
_WAYS = ((FORWARD, BACKWARD), (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT))
# What may precede UPDATE, in order.
_BEFORE: tuple[list[str], ...] = ([], [REDUCE], [NORM], [REDUCE, NORM])


def check_program(
    program: Sequence[Action],
    stages: Sequence[int],
    micro_batches: list[int],
    *,
    train: bool,
    reduces: bool = False,
    gathers: bool = False,
    averages: bool = False,
    updates: bool = True,
) -> None:
    """Refuse a program that misses or repeats something for a stage's micro-batch, or has it in a wrong order.

    reduces, gathers, averages: whether training here cannot do without REDUCE, needs GATHER, and may have AVERAGE.
    updates: whether there is an optimizer here; otherwise parameter servers have it.
    """
    parts = [action for action in program if action.kind in OF_MICRO_BATCH]
    end = [action.kind for action in program[len(parts) :]]
    done: dict[tuple[int, int], tuple[str, ...]] = {}
    for stage, kind, micro_batch in parts:
        done[stage, micro_batch] = (*done.get((stage, micro_batch), ()), kind)
    if (
        done.keys() != {(stage, index) for stage in stages for index in micro_batches}
        or not all(way in (_WAYS if train else ((FORWARD,),)) for way in done.values())
        or end not in (_ends(reduces=reduces, gathers=gathers, averages=averages, updates=updates) if train else ([],))
    ):
        behind = "REDUCE" if reduces else "REDUCE if need be"
        behind += (", NORM if need be, UPDATE" if updates else "") + (
            ", GATHER" if gathers else ", AVERAGE if need be" if averages else ""
        )
        needed = f"F, then B, or I and later W; behind all of them {behind}" if train else "F only"
        raise PlanError(
            "A program does not do what its entry needs",
            expected=f"for each of stages {list(stages)} and each of {len(micro_batches)} micro-batches {needed}",
            got=" ".join(map(str, program))[:500],
        )


def _ends(*, reduces: bool, gathers: bool, averages: bool, updates: bool) -> list[list[str]]:
    """Return what may stand behind a training step's micro-batches."""
    behind: list[list[str]] = [[GATHER]] if gathers else [[], [AVERAGE]] if averages else [[]]
    if not updates:
        return [[REDUCE, *last] for last in behind]
    before = [kinds for kinds in _BEFORE if REDUCE in kinds or not reduces]
    return [[*first, UPDATE, *last] for first in before for last in behind]
