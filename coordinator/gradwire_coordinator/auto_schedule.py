"""Makes a schedule for given costs and limits on memory, at least as good as the best of the named ones.

Tries many rules of the list scheduler, and then makes whole again every backward that gains nothing from being in two
parts. Pure, and deterministic: how much is tried depends on sizes, never on time. Leaves to others: what costs are
(`costs.py`), and what placements to compare (the planner).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradwire_coordinator.list_scheduler import Rules, list_schedule
from gradwire_coordinator.lower_bound import lower_bound
from gradwire_coordinator.named_schedules import named_programs
from gradwire_coordinator.placement import hosted
from gradwire_coordinator.schedules import Programs, one_f_one_b
from gradwire_coordinator.simulator import Simulation, StepCosts, simulate
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action

# Relative; sums of the same numbers in another order are ties.
_TIE = 1e-9
# Of the best, as a factor: not worth another micro-batch in memory.
_NEARLY = 1.002
# In actions that are scheduled or simulated: a quarter of a second or so. Four times as many find next to nothing more.
_BUDGET = 25_000
_FEWEST_TRIES = 20
# In micro-batches of stages: for more of them, trying even the fewest rules would take seconds. And in micro-batches:
# with more of them there is next to no bubble left to fill.
_LARGEST = 2_048
_MOST_MICRO_BATCHES = 128
_MADE = "auto"


@dataclass(frozen=True)
class Candidate:
    """A schedule that was considered; `fits`: within the limits on memory."""

    name: str
    programs: Programs
    simulation: Simulation
    fits: bool

    @property
    def split_backwards(self) -> int:
        return sum(action.kind == INPUT_GRADIENT for program in self.programs for action in program)


@dataclass(frozen=True)
class ScheduleChoice:
    """The best schedule, and all that were compared, by name; `reason`: in a sentence."""

    best: Candidate
    compared: dict[str, Candidate]
    reason: str


def best_schedule(
    costs: StepCosts, micro_batches: int, limits: Sequence[float] | None = None, *, splits: bool = True
) -> ScheduleChoice:
    """Return the fastest schedule of a step on these stages, of the named ones and one made for it.

    limits: bytes of activations that each server may hold; None: any. splits: whether backwards may be in two parts.
    Of very many actions the named ones only are compared, as far as one fits. Of equally fast ones that with fewer
    backwards in two parts is taken, then with less memory. PlanError if none fits.
    """
    if limits is not None:
        _check_limits(costs, limits)
    named = [
        make_candidate(name, programs, costs, limits)
        for name, programs in named_programs(costs.placement, micro_batches).items()
    ]
    named = [candidate for candidate in named if splits or not candidate.split_backwards]
    small = micro_batches * len(costs.placement) <= _LARGEST and micro_batches <= _MOST_MICRO_BATCHES
    fitting = [candidate for candidate in named if candidate.fits]
    if small or not fitting:
        fitting += [candidate for candidate in _made(costs, micro_batches, limits, splits=splits) if candidate.fits]
    best = min(fitting, key=_key)
    joined = _join(best, costs, limits) if small else best
    compared = {candidate.name: candidate for candidate in named}
    if joined.name == _MADE:
        compared[_MADE] = joined
    best_named = min((candidate for candidate in named if candidate.fits), key=_key, default=None)
    return ScheduleChoice(joined, compared, _reason(joined, best_named))


def warm_up_depth(costs: StepCosts, micro_batches: int, limits: Sequence[float] | None = None) -> int:
    """Return how many forwards more than the textbook's 1F1B should run ahead: the fewest that are nearly the best.

    One stage a server. Each of them hides a little more of what links take, and holds one more micro-batch.
    """
    found = [
        make_candidate("1f1b", one_f_one_b(len(costs.placement), micro_batches, extra), costs, limits)
        for extra in range(1 + min(len(costs.placement), micro_batches))
    ]
    fitting = [candidate for candidate in found if candidate.fits] or found[:1]
    best = min(candidate.simulation.seconds for candidate in fitting)
    return next(extra for extra, each in enumerate(fitting) if each.simulation.seconds <= best * _NEARLY)


def _made(costs: StepCosts, micro_batches: int, limits: Sequence[float] | None, *, splits: bool) -> Iterator[Candidate]:
    """Yield what the list scheduler makes of one set of rules after the other, until nothing can be faster."""
    least = lower_bound(costs, micro_batches, splits=splits)
    tries = max(_FEWEST_TRIES, _BUDGET // (3 * micro_batches * len(costs.placement)))
    seen: set[tuple[tuple[Action, ...], ...]] = set()
    for rules in itertools.islice(dict.fromkeys(_all_rules(costs, splits=splits)), tries):
        programs = list_schedule(costs, micro_batches, rules, limits)
        if programs is None or (key := tuple(map(tuple, programs))) in seen:
            continue
        seen.add(key)
        candidate = make_candidate(_MADE, programs, costs, limits)
        yield candidate
        if candidate.fits and candidate.simulation.seconds <= least * (1 + _TIE):
            return


def _all_rules(costs: StepCosts, *, splits: bool) -> Iterator[Rules]:
    """Yield rules: a few that together are nearly always best, then all; what splits and holds the least first."""
    p = 1 + max(costs.placement)
    several = len(costs.placement) > p
    yield from (Rules(1), Rules(p))
    if splits:
        yield from (Rules(ahead, split_last, waiting=p) for split_last in (p, 2 * p) for ahead in (1, p))
        # Found by trying all on random costs, and keeping those that add the most.
        yield Rules(p, p, math.inf, patience=0.5, deep=not several)
        yield Rules(p, 2 * p, math.inf, alternate=False)
        yield Rules(p // 2, math.inf, math.inf, patience=0.5, alternate=False)
        yield Rules(math.inf, 2 * p, p, deep=not several)
        yield Rules(math.inf, 2 * p, math.inf, alternate=False)
        yield Rules(1, math.inf, waiting=p)
    for deep in (True, False) if several else (True,):
        for patience, alternate in itertools.product((1.0, 0.0, 0.5), (True, False)):
            for split_last in (0, p, 2 * p, math.inf) if splits else (0,):
                for ahead, waiting in itertools.product((0, 1, 2, p, math.inf), (1, 2, p, 2 * p, math.inf)):
                    if split_last or (waiting == 1 and patience == 1.0):  # these are of weight gradients only
                        yield Rules(ahead, split_last, waiting, patience, alternate, deep)


def make_candidate(name: str, programs: Programs, costs: StepCosts, limits: Sequence[float] | None) -> Candidate:
    """Return a schedule with what a step of it takes; `fits`: within the limits, where there are any."""
    simulation = simulate(costs.whole_step(programs), costs)
    fits = limits is None or all(held <= limit for held, limit in zip(simulation.peak_bytes, limits, strict=True))
    return Candidate(name, programs, simulation, fits)


def _key(candidate: Candidate) -> tuple[float, int, int]:
    # Rounded: what is equal but for the order of sums is a tie.
    seconds = candidate.simulation.seconds
    digits = 9 - math.ceil(math.log10(seconds)) if seconds > 0 else 0
    return round(seconds, digits), candidate.split_backwards, max(candidate.simulation.peak_bytes)


def _join(candidate: Candidate, costs: StepCosts, limits: Sequence[float] | None) -> Candidate:
    """Return the candidate with every backward whole whose parts, apart, make the step no shorter."""
    best = candidate
    tries = max(_FEWEST_TRIES, _BUDGET // max(1, sum(map(len, candidate.programs))))
    count = 1 + max((action.micro_batch for program in candidate.programs for action in program), default=0)
    whole = [(server, stage, 0, count) for server, own in enumerate(hosted(costs.placement)) for stage in own]
    tie = _TIE * candidate.simulation.seconds / (count * len(whole))  # so that many are still a tie
    # Ranges of a stage's micro-batches, and halves of those that cannot be joined; all again, if any was.
    ranges, changed = list(whole), False
    while tries > 0:
        if not ranges:
            if not changed:
                break
            ranges, changed = list(whole), False
        server, stage, first, behind = ranges.pop(0)
        program = _with_whole_backwards(best.programs[server], stage, first, behind)
        if program is None:
            continue
        tries -= 1
        programs = [*best.programs[:server], program, *best.programs[server + 1 :]]
        joined = make_candidate(_MADE, programs, costs, limits)
        if joined.fits and joined.simulation.seconds <= best.simulation.seconds + tie:
            best, changed = joined, True
        elif behind - first > 1:
            middle = (first + behind) // 2
            ranges += [(server, stage, first, middle), (server, stage, middle, behind)]
    return best


def _with_whole_backwards(program: Sequence[Action], stage: int, first: int, behind: int) -> list[Action] | None:
    """Return a program with whole backwards of a stage's micro-batches first ≤ i < behind; None if nothing changes.

    Weight gradients of micro-batches before them that would come later are done first, so that sums keep their order.
    """
    parts = [
        action.micro_batch
        for action in program
        if action.stage == stage and action.kind == INPUT_GRADIENT and first <= action.micro_batch < behind
    ]
    if not parts:
        return None
    joined: list[Action] = []
    done: set[Action] = set()
    waiting: list[Action] = []
    for action in program:
        if action.stage != stage or action.kind not in (INPUT_GRADIENT, WEIGHT_GRADIENT):
            joined.append(action)
        elif action.kind == WEIGHT_GRADIENT:
            if action not in done:
                joined.append(action)
                waiting.remove(action)
        elif first <= action.micro_batch < behind:
            joined += waiting
            done.update(waiting)
            waiting.clear()
            joined.append(action._replace(kind=BACKWARD))
            done.add(action._replace(kind=WEIGHT_GRADIENT))
        else:
            joined.append(action)
            waiting.append(action._replace(kind=WEIGHT_GRADIENT))
    return joined


def _reason(best: Candidate, best_named: Candidate | None) -> str:
    seconds = best.simulation.seconds
    if best_named is None:
        return f"{best.name} takes {seconds:.3g} s; no named schedule fits in memory"
    if best.name == best_named.name:
        return f"{best.name} takes {seconds:.3g} s; nothing faster was found"
    other = best_named.simulation.seconds
    if other <= seconds * (1 + _TIE):
        gain = "fewer backwards in two parts or less memory"
        return f"{best.name} takes {seconds:.3g} s like {best_named.name}, with {gain}"
    return f"{best.name} takes {seconds:.3g} s, {best_named.name} {other:.3g} s"


def _check_limits(costs: StepCosts, limits: Sequence[float]) -> None:
    """PlanError if not even one micro-batch fits, with all its stages on a server."""
    for server, (stages, limit) in enumerate(zip(hosted(costs.placement), limits, strict=True)):
        needed = sum(costs.held[stage].activations for stage in stages)
        if needed > limit:
            raise PlanError(
                f"The activations of one micro-batch do not fit on server {server}",
                expected=f"at most {limit:.0f} bytes",
                got=f"{needed} bytes: {needed - limit:.0f} too many",
                remedy="more stages, recompute, or smaller micro-batches",
            )
