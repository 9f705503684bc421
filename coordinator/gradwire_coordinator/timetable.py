"""Proves a set of programs complete, in order and free of deadlock, and draws it.

Leaves to others: making the programs (`schedules.py`), and how long an action really takes: here every action takes
one slot, and messages none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, FORWARD, Action, format_program

# Slot in which each action of a micro-batch runs.
Timetable = dict[Action, int]


def check_programs(programs: Sequence[Sequence[Action]], micro_batches: int, *, backward: bool) -> Timetable:
    """Return when each action runs, if receives block and sends do not; raise PlanError if a program set is wrong.

    Complete: program s has exactly the forwards (and backwards) of stage s, each once. In order: of one kind,
    micro-batches ascend, so that sums of gradients have one order; a backward follows its forward; actions of the whole
    step come last. Free of deadlock: forward i of a stage needs that of the stage before, backward i that of the stage
    behind, and some stage can always go on.
    """
    kinds = (FORWARD, BACKWARD) if backward else (FORWARD,)
    per_micro_batch = [[action for action in program if action.kind in (FORWARD, BACKWARD)] for program in programs]
    for stage, (program, actions) in enumerate(zip(programs, per_micro_batch, strict=True)):
        _check_program(stage, program, actions, micro_batches, kinds)
    return _run(per_micro_batch)


def draw(programs: Sequence[Sequence[Action]], timetable: Mapping[Action, int]) -> str:
    """Return the picture of a timetable: a line a stage, a column a slot, `.` where a stage is idle."""
    slots = 1 + max(timetable.values(), default=-1)
    width = 2 + max((len(str(action.micro_batch)) for action in timetable), default=1)
    lines = []
    for program in programs:
        cells = ["."] * slots
        for action in program:
            if action in timetable:
                cells[timetable[action]] = f"{action.kind}{action.micro_batch}"
        lines.append("".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(lines)


def _check_program(
    stage: int, program: Sequence[Action], actions: Sequence[Action], micro_batches: int, kinds: tuple[str, ...]
) -> None:
    for kind in kinds:
        got = [action.micro_batch for action in actions if action.kind == kind and action.stage == stage]
        if got != list(range(micro_batches)):
            raise PlanError(
                f"The program of stage {stage} is not complete and in order",
                expected=f"{kind} of micro-batches 0 to {micro_batches - 1}, each once, ascending",
                got=format_program(program),
            )
    if len(actions) != micro_batches * len(kinds) or list(program[: len(actions)]) != list(actions):
        raise PlanError(
            f"The program of stage {stage} has actions that do not belong",
            expected=f"{' and '.join(kinds)} of stage {stage}, then those of the whole step",
            got=format_program(program),
        )


def _run(programs: Sequence[Sequence[Action]]) -> Timetable:
    last = len(programs) - 1
    done: Timetable = {}
    position = [0] * len(programs)
    slot = 0
    while any(position[stage] < len(program) for stage, program in enumerate(programs)):
        ready = [
            program[position[stage]]
            for stage, program in enumerate(programs)
            if position[stage] < len(program) and all(need in done for need in _needs(program[position[stage]], last))
        ]
        if not ready:
            waiting = [
                f"stage {stage} at {program[position[stage]]}"
                for stage, program in enumerate(programs)
                if position[stage] < len(program)
            ]
            raise PlanError("The programs deadlock", expected="some stage that can go on", got=", ".join(waiting))
        for action in ready:
            done[action] = slot
            position[action.stage] += 1
        slot += 1
    return done


def _needs(action: Action, last: int) -> list[Action]:
    """Return the actions whose results `action` waits for."""
    stage, kind, i = action
    if kind == FORWARD:
        return [Action(stage - 1, FORWARD, i)] if stage > 0 else []
    own = Action(stage, FORWARD, i)
    return [own, Action(stage + 1, BACKWARD, i)] if stage < last else [own]
