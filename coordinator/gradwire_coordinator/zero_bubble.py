"""Schedules with backwards in two parts (Qi et al., Zero Bubble Pipeline Parallelism, 2024), as pure functions.

A gradient of an input, I, is what the stage before waits for; that of the weights, W, nobody waits for, so it fills
what would be a bubble. Leaves to others: schedules made for given costs (`auto_schedule.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_coordinator.schedules import Programs, check_sizes
from gradwire_protocol.program import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action


def zb_h1(servers: int, micro_batches: int) -> Programs:
    """1F1B with late weight gradients: a third of its bubble if F, I and W take as long, and no more activations.

    Server s of p runs p − s − 1 forwards ahead, as in 1F1B, and keeps s weight gradients back. Three servers, four
    micro-batches::

        F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    check_sizes(servers, micro_batches)
    programs = []
    for stage in range(servers):
        warm_up = min(micro_batches, servers - stage - 1)
        program = [Action(stage, FORWARD, i) for i in range(warm_up)]
        for i in range(micro_batches):
            if warm_up + i < micro_batches:
                program.append(Action(stage, FORWARD, warm_up + i))
            program.append(Action(stage, INPUT_GRADIENT, i))
            if i >= stage:
                program.append(Action(stage, WEIGHT_GRADIENT, i - stage))
        program += [Action(stage, WEIGHT_GRADIENT, i) for i in range(max(0, micro_batches - stage), micro_batches)]
        programs.append(program)
    return programs


def zb_v(servers: int, micro_batches: int) -> Programs:
    """Two stages a server, there and back: no bubble but the fill if F, I and W take as long, and 1F1B's activations.

    Placement: `v_shaped`; the first server has the first stage and the last, so that a micro-batch's backward begins
    where its forward ends. Two servers, four micro-batches::

        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3 .
        .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3

    With fewer than 2 p − 1 micro-batches it is the same schedule, less those that are not there.
    """
    check_sizes(servers, micro_batches)
    return [_zb_v_program(server, servers, micro_batches) for server in range(servers)]


def _zb_v_program(server: int, servers: int, micro_batches: int) -> list[Action]:
    there, back = server, 2 * servers - 1 - server
    count = max(2 * servers - 1, micro_batches)  # so many fill the pipeline
    program: list[Action] = []
    next_of: dict[tuple[int, str], int] = {}

    def add(stage: int, *kinds: str) -> None:
        for kind in kinds:
            i = next_of.get((stage, kind), 0)
            next_of[stage, kind] = i + 1
            program.append(Action(stage, kind, i))

    def added(stage: int, kind: str) -> int:
        return next_of.get((stage, kind), 0)

    # Warm up: until the first micro-batches are back.
    for _ in range(2 * (servers - server) - 1):
        add(there, FORWARD)
    for _ in range(server):
        add(back, FORWARD)
        add(there, FORWARD)
    for _ in range(servers - server):
        add(back, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
    # As many forwards as backwards.
    while added(back, FORWARD) < added(there, FORWARD) or added(there, FORWARD) < count:
        if added(there, FORWARD) < count:
            add(there, FORWARD)
        add(there, INPUT_GRADIENT, WEIGHT_GRADIENT)
        add(back, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
    # Cool down: input gradients first.
    for _ in range(server):
        add(there, INPUT_GRADIENT)
        add(back, INPUT_GRADIENT)
    for _ in range(servers - server):
        add(there, INPUT_GRADIENT, WEIGHT_GRADIENT)
    for stage in (back, there):
        while added(stage, WEIGHT_GRADIENT) < added(stage, INPUT_GRADIENT):
            add(stage, WEIGHT_GRADIENT)
    return [action for action in program if action.micro_batch < micro_batches]


def join_where_nobody_waits(programs: Programs) -> Programs:
    """Return the programs with whole backwards on stage 0 where W follows I at once: nobody waits for its I."""
    return [_join(program) for program in programs]


def _join(program: Sequence[Action]) -> list[Action]:
    joined: list[Action] = []
    for action in program:
        if action.stage == 0 and action.kind == WEIGHT_GRADIENT and joined[-1] == action._replace(kind=INPUT_GRADIENT):
            joined[-1] = action._replace(kind=BACKWARD)
        else:
            joined.append(action)
    return joined
