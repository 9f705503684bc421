"""Proves a set of programs complete, in order and free of deadlock, and draws it.

Leaves to others: making the programs (`schedules.py`), how many messages lie untaken (`bounds.py`: servers grant so
many, so that no send waits), and how long an action really takes (`simulator.py`): here every action takes one slot,
and messages none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradwire_coordinator.placement import hosted, looped
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    OF_MICRO_BATCH,
    WEIGHT_GRADIENT,
    Action,
    format_program,
)

# Slot in which each action of a micro-batch runs.
Timetable = dict[Action, int]

# What sends gradients, and what adds to those of the weights. Of each, micro-batches of a stage ascend.
SENDS_GRADIENTS = (BACKWARD, INPUT_GRADIENT)
ADDS_GRADIENTS = (BACKWARD, WEIGHT_GRADIENT)
_SHOWN_ACTIONS = 60


def check_programs(
    programs: Sequence[Sequence[Action]],
    micro_batches: int,
    *,
    backward: bool,
    placement: Sequence[int] | None = None,
) -> Timetable:
    """Return when each action runs, if receives block and sends do not; raise PlanError if a program set is wrong.

    placement: the server of each stage; None: one stage a server.

    Complete: program s has exactly the forwards (and backwards, each whole or as I and W) of the stages of server s,
    each once. In order: of a stage, forwards ascend, what sends gradients (B and I) ascends, and so does what adds to
    them (B and W), so that sums have one order; B and I follow their forward, W its I; actions of the whole step come
    last. Free of deadlock: forward i of a stage needs that of the stage before, backward i that of the stage behind,
    and some server can always go on.
    """
    placement = looped(len(programs)) if placement is None else placement
    stages_of = hosted(placement)
    if len(stages_of) != len(programs):
        raise PlanError("One program a server", expected=f"{len(stages_of)} programs", got=f"{len(programs)}")
    per_micro_batch = [[action for action in program if action.kind in OF_MICRO_BATCH] for program in programs]
    for server, (program, actions) in enumerate(zip(programs, per_micro_batch, strict=True)):
        for problem in _problems(program, actions, stages_of[server], micro_batches, backward=backward):
            raise PlanError(f"The program of server {server} is not {problem}", got=_shown(program))
    return _run(per_micro_batch, last_stage=len(placement) - 1)


def draw(programs: Sequence[Sequence[Action]], timetable: Mapping[Action, int]) -> str:
    """Return the picture of a timetable: a line a server, a column a slot, `.` where a server is idle.

    Actions are written with their stage where a server has several.
    """
    slots = 1 + max(timetable.values(), default=-1)
    several = any(len({action.stage for action in program if action in timetable}) > 1 for program in programs)
    width = 1 + max((len(_cell(action, several)) for action in timetable), default=1)
    lines = []
    for program in programs:
        cells = ["."] * slots
        for action in program:
            if action in timetable:
                cells[timetable[action]] = _cell(action, several)
        lines.append("".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(lines)


def _cell(action: Action, with_stage: bool) -> str:
    return str(action) if with_stage else f"{action.kind}{action.micro_batch}"


def _shown(program: Sequence[Action]) -> str:
    text = format_program(program[:_SHOWN_ACTIONS])
    return text if len(program) <= _SHOWN_ACTIONS else f"{text} … ({len(program)} actions)"


def _problems(
    program: Sequence[Action], actions: Sequence[Action], stages: Sequence[int], micro_batches: int, *, backward: bool
) -> Iterator[str]:
    """Yield what is wrong with a program, to follow "is not": the kind of fault, then the action."""
    kinds = OF_MICRO_BATCH if backward else {FORWARD}
    place: dict[Action, int] = {}
    for number, action in enumerate(actions):
        if action.stage not in stages or action.kind not in kinds or not 0 <= action.micro_batch < micro_batches:
            yield f"its own: {action} does not belong there"
        if action in place:
            yield f"complete and without repetition: {action} comes twice"
        place[action] = number
    if list(program[: len(actions)]) != list(actions):
        first = next(action for action in program if action.kind not in OF_MICRO_BATCH)
        yield f"in order: {first} does not belong before actions of micro-batches"
    for stage in stages:
        yield from _stage_problems(place, stage, micro_batches, backward=backward)


def _stage_problems(place: Mapping[Action, int], stage: int, micro_batches: int, *, backward: bool) -> Iterator[str]:
    before: dict[tuple[str, ...], tuple[int, Action]] = {}

    def ascends(kinds: tuple[str, ...], action: Action) -> Iterator[str]:
        previous, of = before.get(kinds, (-1, action))
        if place[action] < previous:
            yield f"in order: {action} comes before {of}"
        before[kinds] = place[action], action

    for i in range(micro_batches):
        forward, whole, first, second = (
            Action(stage, kind, i) for kind in (FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
        )
        if forward not in place:
            yield f"complete: {forward} is missing"
        yield from ascends((FORWARD,), forward)
        if not backward:
            continue
        if whole in place:
            if first in place or second in place:
                yield f"complete and without repetition: {whole} is all of {first} and {second}"
            first = second = whole
        for action in (first, second):
            if action not in place:
                yield f"complete: {whole if first not in place and second not in place else action} is missing"
        if place[first] < place[forward]:
            yield f"in order: {first} comes before {forward}"
        if place[second] < place[first]:
            yield f"in order: {second} comes before {first}"
        yield from ascends(SENDS_GRADIENTS, first)
        yield from ascends(ADDS_GRADIENTS, second)


def _run(programs: Sequence[Sequence[Action]], last_stage: int) -> Timetable:
    done: Timetable = {}
    position = [0] * len(programs)
    slot = 0
    while any(position[server] < len(program) for server, program in enumerate(programs)):
        ready = [
            server
            for server, program in enumerate(programs)
            if position[server] < len(program) and _missing(program[position[server]], last_stage, done) is None
        ]
        if not ready:
            waiting = [
                f"server {server} at {action}, which waits for {_missing(action, last_stage, done)}"
                for server, program in enumerate(programs)
                if position[server] < len(program)
                for action in [program[position[server]]]
            ]
            raise PlanError("The programs deadlock", expected="some server that can go on", got="; ".join(waiting))
        for action in [programs[server][position[server]] for server in ready]:
            done[action] = slot
        for server in ready:
            position[server] += 1
        slot += 1
    return done


def _missing(action: Action, last_stage: int, done: Mapping[Action, int]) -> Action | None:
    """Return the action of another stage whose result `action` waits for."""
    stage, kind, i = action
    if kind == FORWARD and stage > 0:
        need = Action(stage - 1, FORWARD, i)
        return None if need in done else need
    if kind in SENDS_GRADIENTS and stage < last_stage:
        needs = [Action(stage + 1, sends, i) for sends in SENDS_GRADIENTS]
        return None if any(need in done for need in needs) else needs[0]
    return None
