"""Schedules: pure functions from (stages, micro-batches) to one program a stage.

Leaves to others: what a stage does around its micro-batches (REDUCE, NORM, UPDATE; see `programs.py`), and running
them. The tables show a program a row; every column is one time slot, `F2` the forward of micro-batch 2, `B2` its
backward, `.` a bubble (`timetable.py` draws them).
"""

from __future__ import annotations

from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, FORWARD, Action

# One program a stage, by stage.
Programs = list[list[Action]]

# What "auto" adds to the textbook's warm-up: one micro-batch hides a link's latency in both directions.
AUTO_EXTRA_WARM_UP = 1


def gpipe(stages: int, micro_batches: int) -> Programs:
    """All forwards, then all backwards (Huang et al., GPipe, 2019). Every stage holds all micro-batches at its peak.

    Three stages, four micro-batches::

        F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .

    Backwards run in the order of the forwards, as in 1F1B, so that gradients are summed in the same order.
    """
    _check(stages, micro_batches)
    return [
        [Action(stage, kind, i) for kind in (FORWARD, BACKWARD) for i in range(micro_batches)]
        for stage in range(stages)
    ]


def one_f_one_b(stages: int, micro_batches: int, extra_warm_up: int = 0) -> Programs:
    """Warm up, then one forward and one backward in turn (Narayanan et al., PipeDream-Flush, 2021).

    Stage s of p runs p − s − 1 forwards ahead, so it holds at most p − s micro-batches. Three stages, four
    micro-batches::

        F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

    `extra_warm_up` forwards more run ahead on every stage but the last: with a link that takes time, a stage then has
    its next input already when it sends a gradient back. The last stage waits for no gradient, so it needs none.
    """
    _check(stages, micro_batches)
    if extra_warm_up < 0:
        raise PlanError("Extra warm-up cannot be negative", expected="0 or more", got=str(extra_warm_up))
    programs = []
    for stage in range(stages):
        behind = stages - stage - 1
        warm_up = min(micro_batches, behind + (extra_warm_up if behind else 0))
        program = [Action(stage, FORWARD, i) for i in range(warm_up)]
        for backward in range(micro_batches):
            forward = warm_up + backward
            if forward < micro_batches:
                program.append(Action(stage, FORWARD, forward))
            program.append(Action(stage, BACKWARD, backward))
        programs.append(program)
    return programs


def forward_only(stages: int, micro_batches: int) -> Programs:
    """All forwards, in order: evaluation and prediction.

    Two stages, three micro-batches::

        F0 F1 F2 .
        .  F0 F1 F2
    """
    _check(stages, micro_batches)
    return [[Action(stage, FORWARD, i) for i in range(micro_batches)] for stage in range(stages)]


def _check(stages: int, micro_batches: int) -> None:
    if stages < 1 or micro_batches < 1:
        raise PlanError(
            "A schedule needs at least one stage and one micro-batch",
            expected="stages and micro-batches of 1 or more",
            got=f"{stages} stages, {micro_batches} micro-batches",
        )
