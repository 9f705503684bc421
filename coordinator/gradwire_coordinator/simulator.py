"""How long a step takes and what it holds: runs programs against the costs of their actions and of links.

Pure. Receives block, sends do not; a link carries one message a direction at a time, both directions at once, while
its ends compute; stages on one server need none. Leaves to others: making programs (`schedules.py`), and where the
costs come from (`costs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from gradwire_coordinator.placement import Placement
from gradwire_coordinator.timetable import SENDS_GRADIENTS
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

# A backward in two parts: the gradients of a layer's inputs take about as long as those of its weights.
_INPUT_SHARE = 0.5


@dataclass(frozen=True)
class StageSeconds:
    """What one micro-batch takes on a stage.

    input_gradient, weight_gradient: the parts of the backward, where it is in two; None: not measured, half of it each.
    """

    forward: float
    backward: float
    input_gradient: float | None = None
    weight_gradient: float | None = None

    @classmethod
    def in_parts(cls, forward: float, input_gradient: float, weight_gradient: float) -> StageSeconds:
        """Return the seconds of a stage whose backward takes as long in two parts as whole."""
        return cls(forward, input_gradient + weight_gradient, input_gradient, weight_gradient)

    def plus(self, forward: float, backward: float) -> StageSeconds:
        """Return these seconds with more that each forward takes, and each backward or its first part."""
        first = self.of[INPUT_GRADIENT]
        return StageSeconds(
            self.forward + forward, self.backward + backward, first + backward, self.of[WEIGHT_GRADIENT]
        )

    @cached_property
    def of(self) -> dict[str, float]:
        """The seconds of an action, by kind."""
        first, second = self.input_gradient, self.weight_gradient
        return {
            FORWARD: self.forward,
            BACKWARD: self.backward,
            INPUT_GRADIENT: self.backward * _INPUT_SHARE if first is None else first,
            WEIGHT_GRADIENT: self.backward * (1 - _INPUT_SHARE) if second is None else second,
        }


@dataclass(frozen=True)
class LinkSeconds:
    """What one micro-batch takes on a link: time in which the link is busy each way, and its delay one way."""

    forward: float
    backward: float
    delay: float


@dataclass(frozen=True)
class StageBytes:
    """What one micro-batch holds on a stage: from its forward to its B or I, and from there to its W."""

    activations: int
    for_weights: int


@dataclass(frozen=True)
class StepCosts:
    """What the stages of a step cost, for one micro-batch each, and where they are."""

    placement: Placement
    stages: tuple[StageSeconds, ...]
    # Between stage b and b + 1, one fewer than stages; without effect where both are on one server.
    links: tuple[LinkSeconds, ...]
    held: tuple[StageBytes, ...]
    # Of the whole step, by server: adding the gradients of tied copies, once all have sent theirs, and the optimizer;
    # and, before both, the exchange of gradients with the same server of other replicas. Empty: nobody has any.
    reduce: tuple[float, ...] = ()
    update: tuple[float, ...] = ()
    exchange: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count, servers = len(self.placement), 1 + max(self.placement)
        if any(len(seconds) not in (0, servers) for seconds in (self.reduce, self.update, self.exchange)):
            raise PlanError("Costs that do not fit the servers", expected=f"of {servers}", got=str(self)[:200])
        if (len(self.stages), len(self.links), len(self.held)) != (count, max(0, count - 1), count):
            raise PlanError(
                "Costs that do not fit the stages",
                expected=f"costs of {count} stages and the {count - 1} links between them",
                got=f"{len(self.stages)} times, {len(self.links)} links, {len(self.held)} sizes",
            )

    def link(self, stage: int, target: int) -> LinkSeconds | None:
        """Return the link from a stage to the one before or behind it; None where both are on one server."""
        return None if self.placement[stage] == self.placement[target] else self.links[min(stage, target)]

    def whole_step(self, programs: Sequence[Sequence[Action]]) -> list[list[Action]]:
        """Return programs with what comes at the end of a step, as far as it costs anything."""
        reduce = [self.reduce_seconds(server) for server in range(len(programs))]
        parts = [(Action(0, kind, 0), of) for kind, of in ((REDUCE, reduce), (UPDATE, self.update)) if of]
        return [
            [*program, *(action for action, seconds in parts if seconds[server] > 0)]
            for server, program in enumerate(programs)
        ]

    def reduce_seconds(self, server: int) -> float:
        """Return what a server's REDUCE takes, waits left out."""
        return sum(seconds[server] for seconds in (self.exchange, self.reduce) if seconds)

    def seconds_at_the_end(self, server: int) -> float:
        """Return what a server does at the end of a step takes, waits left out."""
        return self.reduce_seconds(server) + (self.update[server] if self.update else 0.0)


class Timed(NamedTuple):
    """An action with its seconds from the start of the step."""

    server: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A step as it would go. Tuples go by server."""

    timed: tuple[tuple[Timed, ...], ...]
    # To the end of the last action.
    seconds: float
    busy: tuple[float, ...]
    # Most micro-batches of its stages whose forward has begun, and B or I has not ended.
    peak_live: tuple[int, ...]
    peak_bytes: tuple[int, ...]

    @property
    def bubble_ratio(self) -> float:
        """Share of the step in which servers had nothing to do, on average."""
        whole = self.seconds * len(self.busy)
        return 1 - sum(self.busy) / whole if whole > 0 else 0.0


def simulate(programs: Sequence[Sequence[Action]], costs: StepCosts) -> Simulation:
    """Return how a step goes; PlanError if the programs deadlock.

    programs: one a server. REDUCE and NORM begin when everyone who has one is there; where replicas exchange gradients,
    each server does that first, and alone: all replicas are at the same point then.
    """
    placement, last = costs.placement, len(costs.placement) - 1
    seconds = [stage.of for stage in costs.stages]
    work = [[action for action in program if action.kind in OF_MICRO_BATCH] for program in programs]
    timed: list[list[Timed]] = [[] for _ in work]
    arrived: dict[tuple[int, bool, int], float] = {}  # (stage, forward?, micro-batch): when its input is there
    free: dict[tuple[int, int], float] = {}  # (from, to): when a link has sent what it was given
    clocks = [0.0] * len(work)
    to_run = list(range(len(work)))
    while to_run:
        server = to_run.pop()
        program, done = work[server], timed[server]
        while len(done) < len(program):
            action = program[len(done)]
            stage, kind, i = action
            forward = kind == FORWARD
            start = clocks[server]
            if (stage > 0) if forward else (stage < last and kind in SENDS_GRADIENTS):
                there = arrived.get((stage, forward, i))
                if there is None:
                    break
                start = max(start, there)
            end = start + seconds[stage][kind]
            clocks[server] = end
            done.append(Timed(server, action, start, end))
            target = stage + 1 if forward else stage - 1
            if 0 <= target <= last and kind != WEIGHT_GRADIENT:
                link, other = costs.link(stage, target), placement[target]
                if link is not None:
                    sent = max(free.get((server, other), 0.0), end) + (link.forward if forward else link.backward)
                    free[server, other] = sent
                    end = sent + link.delay
                    to_run.append(other)
                arrived[target, forward, i] = end
    if any(len(done) < len(program) for done, program in zip(timed, work, strict=True)):
        stuck = [
            f"server {server} at {program[len(done)]}"
            for server, (done, program) in enumerate(zip(timed, work, strict=True))
            if len(done) < len(program)
        ]
        raise PlanError("The programs deadlock", expected="some server that can go on", got=", ".join(stuck))
    for kind, of_servers in ((REDUCE, costs.reduce), (NORM, ()), (UPDATE, costs.update)):
        whole = Action(0, kind, 0)
        taking_part = [server for server, program in enumerate(programs) if whole in program]
        alone = costs.exchange if kind == REDUCE and costs.exchange else (0.0,) * len(programs)
        ready = {server: clocks[server] + alone[server] for server in taking_part}
        # Every server has a REDUCE then, but only tied copies wait for each other.
        waiting = [server for server in taking_part if not any(alone) or (of_servers and of_servers[server] > 0)]
        together = max((ready[server] for server in waiting), default=0.0)
        for server in taking_part:
            begun = together if kind != UPDATE and server in waiting else ready[server]
            clocks[server] = begun + (of_servers[server] if of_servers else 0.0)
            timed[server].append(Timed(server, whole, begun - alone[server], clocks[server]))
    peaks = [_peaks(program, costs.held) for program in work]
    return Simulation(
        timed=tuple(map(tuple, timed)),
        seconds=max(clocks, default=0.0),
        busy=tuple(sum(item.end - item.start for item in done) for done in timed),
        peak_live=tuple(live for live, _ in peaks),
        peak_bytes=tuple(size for _, size in peaks),
    )


def step_seconds(
    programs: Sequence[Sequence[Action]], stages: Sequence[StageSeconds], links: Sequence[LinkSeconds]
) -> float:
    """Return the seconds from the first forward of a step to the end of its last action; PlanError for a deadlock.

    links: between stage b and b + 1, one fewer than stages; without effect between stages of one server.
    """
    server_of = {action.stage: server for server, program in enumerate(programs) for action in program}
    placement = tuple(server_of[stage] for stage in sorted(server_of))
    nothing = (StageBytes(0, 0),) * len(stages)
    return simulate(programs, StepCosts(placement, tuple(stages), tuple(links), nothing)).seconds


def equal_stages_bubble(programs: Sequence[Sequence[Action]], placement: Placement) -> float:
    """Return the bubble of a step if all stages, and F, I and W, take as long, and links no time.

    Of 1F1B it is (p − 1) ÷ (m + p − 1).
    """
    count = len(placement)
    equal = (StageSeconds.in_parts(1.0, 1.0, 1.0),) * count
    costs = StepCosts(placement, equal, (LinkSeconds(0.0, 0.0, 0.0),) * (count - 1), (StageBytes(0, 0),) * count)
    done = simulate(programs, costs)
    return 1.0 - sum(done.busy) / (len(done.busy) * done.seconds)


def _peaks(program: Sequence[Action], held: Sequence[StageBytes]) -> tuple[int, int]:
    live = size = most_live = most_bytes = 0
    for stage, kind, _ in program:
        of_stage = held[stage]
        if kind == FORWARD:
            live, size = live + 1, size + of_stage.activations
        elif kind == BACKWARD:
            live, size = live - 1, size - of_stage.activations
        elif kind == INPUT_GRADIENT:
            live, size = live - 1, size - of_stage.activations + of_stage.for_weights
        else:
            size -= of_stage.for_weights
        most_live, most_bytes = max(most_live, live), max(most_bytes, size)
    return most_live, most_bytes
