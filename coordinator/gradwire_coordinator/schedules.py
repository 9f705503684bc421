"""Schedules: pure functions from (servers, micro-batches, …) to one program a server.

Leaves to others: schedules that split backwards (`zero_bubble.py`, `auto_schedule.py`), what a server does around its
micro-batches (REDUCE, NORM, UPDATE; see `programs.py`), and running them. The tables show a program a row; every column
is one time slot, `F2` the forward of micro-batch 2, `B2` its backward, `.` a bubble (`timetable.py` draws them).
"""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_coordinator.placement import hosted, looped
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, FORWARD, Action

# One program a server; without virtual stages server s hosts stage s.
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
    check_sizes(stages, micro_batches)
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
    check_sizes(stages, micro_batches)
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


def interleaved_1f1b(servers: int, micro_batches: int, virtual_stages: int) -> Programs:
    """1F1B with several stages a server, which shortens the bubble (Narayanan et al., Megatron-LM, 2021).

    Placement: `looped`. Micro-batches go through a server's stages in rounds of at least as many as there are servers.
    Two servers with two stages each, four micro-batches::

        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 .   2B2 .   2B3 0B2 0B3
        .   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 .

    Where the micro-batches are no multiple of the rounds, the first rounds have one more. One virtual stage is 1F1B.
    """
    check_sizes(servers, micro_batches)
    if virtual_stages == 1:
        return one_f_one_b(servers, micro_batches)
    rounds = max(1, micro_batches // servers)
    longest = -(-micro_batches // rounds)
    stages_of = hosted(looped(servers, virtual_stages))
    programs = []
    for server, stages in enumerate(stages_of):
        forwards = _in_rounds(FORWARD, stages, micro_batches, rounds)
        backwards = _in_rounds(BACKWARD, stages[::-1], micro_batches, rounds)
        warm_up = min(len(forwards), (virtual_stages - 1) * longest + 2 * (servers - server - 1))
        program = forwards[:warm_up]
        for number, action in enumerate(backwards):
            program += forwards[warm_up + number : warm_up + number + 1]
            program.append(action)
        programs.append(program)
    return programs


def forward_only(servers: int, micro_batches: int, placement: Sequence[int] | None = None) -> Programs:
    """All forwards, in order: evaluation and prediction.

    Two servers, three micro-batches::

        F0 F1 F2 .
        .  F0 F1 F2

    placement: the server of each stage; None: one stage a server. With several, micro-batches go through a server's
    stages in rounds of as many as there are servers, so that a server is not idle while the others have its next input.
    """
    check_sizes(servers, micro_batches)
    rounds = max(1, micro_batches // servers)
    stages_of = hosted(looped(servers) if placement is None else placement)
    return [_in_rounds(FORWARD, stages, micro_batches, rounds) for stages in stages_of]


def _in_rounds(kind: str, stages: Sequence[int], micro_batches: int, rounds: int) -> list[Action]:
    shortest, longer = divmod(micro_batches, rounds)
    program, first = [], 0
    for number in range(rounds):
        behind = first + shortest + (number < longer)
        program += [Action(stage, kind, i) for stage in stages for i in range(first, behind)]
        first = behind
    return program


def check_sizes(stages: int, micro_batches: int) -> None:
    if stages < 1 or micro_batches < 1:
        raise PlanError(
            "A schedule needs at least one stage and one micro-batch",
            expected="stages and micro-batches of 1 or more",
            got=f"{stages} stages, {micro_batches} micro-batches",
        )


def first_micro_batches(programs: Programs, micro_batches: int) -> Programs:
    """Return the programs of a step with fewer micro-batches: those of a full one, less what is not there."""
    return [[action for action in program if action.micro_batch < micro_batches] for program in programs]
