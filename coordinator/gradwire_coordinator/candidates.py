"""Which schedule a run gets: all that it could have on each way to cut and place it, compared; one chosen, and why.

Pure. Leaves to others: the ways and their costs (`planner.py`), and the schedules themselves (`named_schedules.py`,
`auto_schedule.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradwire_coordinator.auto_schedule import Candidate, best_schedule, make_candidate, warm_up_depth
from gradwire_coordinator.lower_bound import lower_bound
from gradwire_coordinator.named_schedules import named_programs, named_schedule
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.simulator import StepCosts
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, INPUT_GRADIENT

AUTO = "auto"
_ONE_F_ONE_B = "1f1b"
_DEEPER = f"{_ONE_F_ONE_B}+"
# Relative; what is equal but for the order of sums is a tie.
_TIE = 1e-9
# Of a step: being faster by less is not worth a word.
_NOTABLE = 0.005


@dataclass(frozen=True, eq=False)
class Way:
    """A cut of the model with a place for each stage, and what it costs. Tuples go by server."""

    cuts: tuple[int, ...]
    costs: StepCosts
    # What a server holds whatever the schedule, and what its device has; 0: not known.
    held_bytes: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    # Between servers for one micro-batch, both ways; and for each step, from its servers to those of other replicas. Of
    # one shard, with what it sends to the others.
    traffic_bytes: int
    exchange_bytes: int = 0

    @property
    def placement(self) -> Placement:
        return self.costs.placement

    @property
    def servers(self) -> int:
        return len(self.held_bytes)

    @property
    def virtual_stages(self) -> int:
        """Stages on each server."""
        return len(self.placement) // self.servers

    @property
    def limits(self) -> list[float] | None:
        """Bytes of activations that each server may hold; None: any."""
        if not any(self.memory_bytes):
            return None
        return [
            max(0.0, float(memory - held)) if memory else float("inf")
            for memory, held in zip(self.memory_bytes, self.held_bytes, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Considered:
    """A schedule on a way."""

    way: Way
    candidate: Candidate

    @property
    def schedule(self) -> str:
        """Its name, without the depth of its warm-up."""
        return self.candidate.name.partition("+")[0]

    @property
    def extra_warm_up(self) -> int:
        return int(self.candidate.name.partition("+")[2] or 0)

    @property
    def seconds(self) -> float:
        return self.candidate.simulation.seconds

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """All that each server holds at the peak."""
        activations = self.candidate.simulation.peak_bytes
        return tuple(held + own for held, own in zip(self.way.held_bytes, activations, strict=True))

    def __str__(self) -> str:
        name = f"the {AUTO} schedule" if self.candidate.name == AUTO else self.candidate.name
        return f"{name} with {self.way.virtual_stages} stages a server" if self.way.virtual_stages > 1 else name


@dataclass(frozen=True, eq=False)
class Choice:
    """What is carried out; all that was considered, the fastest first; and why, in a sentence."""

    chosen: Considered
    considered: tuple[Considered, ...]
    reason: str
    # No order of actions is faster on the chosen way.
    lower_bound_seconds: float


def choose(asked: str, ways: Sequence[Way], micro_batches: int) -> Choice:
    """Return the schedule that a plan asks for, or under "auto" the fastest one.

    ways: at least one. 1F1B gets a warm-up as deep as its links want it. PlanError if nothing, or what was asked for,
    fits in memory, or if there is no way with its placement.
    """
    if asked == AUTO:
        chosen, considered = _fastest(ways, micro_batches)
    else:
        chosen, considered = _asked(asked, ways, micro_batches)
    considered.sort(key=lambda item: (item.seconds, item.candidate.name, item.way.virtual_stages))
    return Choice(
        chosen,
        tuple(considered),
        _reason(asked, chosen, considered),
        lower_bound(chosen.way.costs, micro_batches),
    )


def _fastest(ways: Sequence[Way], micro_batches: int) -> tuple[Considered, list[Considered]]:
    best: list[Considered] = []
    considered: list[Considered] = []
    problem: PlanError | None = None
    for way in ways:
        try:
            found = best_schedule(way.costs, micro_batches, way.limits)
        except PlanError as error:
            problem = problem or error
            continue
        best.append(Considered(way, found.best))
        # What was compared by its name may be kept, with every backward whole that gains nothing from being in two.
        others = (each for each in found.compared.values() if each.name != found.best.name)
        considered += [best[-1], *_considered(way, others, micro_batches)]
    if problem is not None and not best:
        raise problem
    # Of equally fast ones the first: ways come with the fewest stages first, and so with the fewest messages.
    fastest = min(item.seconds for item in best)
    return next(item for item in best if item.seconds <= fastest * (1 + _TIE)), considered


def _asked(asked: str, ways: Sequence[Way], micro_batches: int) -> tuple[Considered, list[Considered]]:
    considered: list[Considered] = []
    for way in ways:
        named = named_programs(way.placement, micro_batches)
        candidates = [make_candidate(name, programs, way.costs, way.limits) for name, programs in named.items()]
        considered += _considered(way, candidates, micro_batches)
    same = [item for item in considered if item.schedule == named_schedule(asked).name]
    if not same:
        raise PlanError(
            f"The stages are not placed as {asked} needs them", got=str([list(way.placement)[:20] for way in ways])
        )
    chosen = max(same, key=lambda item: item.extra_warm_up)
    if not chosen.candidate.fits:
        raise _too_large(chosen, considered)
    return chosen, considered


def _considered(way: Way, candidates: Iterable[Candidate], micro_batches: int) -> list[Considered]:
    """Return the candidates, with at most one of 1F1B's deeper warm-ups: that which its links want."""
    depth = warm_up_depth(way.costs, micro_batches, way.limits) if way.virtual_stages == 1 else 0
    return [
        Considered(way, each)
        for each in candidates
        if not each.name.startswith(_DEEPER) or each.name == f"{_DEEPER}{depth}"
    ]


def _too_large(chosen: Considered, considered: Sequence[Considered]) -> PlanError:
    way = chosen.way
    missing = [
        max(0, peak - memory) if memory else 0 for peak, memory in zip(chosen.peak_bytes, way.memory_bytes, strict=True)
    ]
    server = max(range(way.servers), key=missing.__getitem__)
    fitting = dict.fromkeys(str(item) for item in considered if item.candidate.fits)
    return PlanError(
        f"The schedule {chosen.candidate.name} does not fit in the memory of server {server} of the pipeline",
        expected=f"at most {way.memory_bytes[server]:,} bytes",
        got=f"{chosen.peak_bytes[server]:,} bytes at the peak: {missing[server]:,} too many",
        remedy=f"take a schedule that fits ({', '.join(fitting)}), more stages, recompute, or more micro-batches"
        if fitting
        else "more stages, recompute, or more and so smaller micro-batches",
    )


def _reason(asked: str, chosen: Considered, considered: Sequence[Considered]) -> str:
    others = [item for item in considered if item is not chosen and item.candidate.fits]
    next_best = min(others, key=lambda item: item.seconds, default=None)
    if asked == AUTO:
        why = _why_the_fastest(chosen, next_best)
    else:
        why = f"the plan asks for {asked}"
        if chosen.extra_warm_up:
            why += f"; its warm-up is {chosen.extra_warm_up} deeper than the textbook's, which hides what links take"
        if next_best is not None and next_best.seconds < chosen.seconds * (1 - _NOTABLE):
            gain = 1 - next_best.seconds / chosen.seconds
            why += f"; {next_best} would take {gain:.1%} less, {_shown(next_best.seconds)}"
    left_out = dict.fromkeys(str(item) for item in considered if not item.candidate.fits)
    if left_out:
        why += f"; there is not enough memory for {', '.join(left_out)}"
    return why


def _why_the_fastest(chosen: Considered, next_best: Considered | None) -> str:
    if next_best is None:
        return f"{chosen} is the only one that was considered and fits"
    if chosen.candidate.name == AUTO:
        why = f"an order made for these costs takes {_shown(chosen.seconds)}"
    else:
        why = f"{chosen} is the fastest, with {_shown(chosen.seconds)}"
    gain = next_best.seconds / chosen.seconds - 1 if chosen.seconds > 0 else 0.0
    why += f"; the next best, {next_best}, " + (
        f"takes {gain:.1%} more, {_shown(next_best.seconds)}" if gain >= _NOTABLE else "takes about as long"
    )
    actions = [action.kind for program in chosen.candidate.programs for action in program]
    split, whole = actions.count(INPUT_GRADIENT), actions.count(BACKWARD)
    if split:
        why += f"; {split} of {split + whole} backwards are in two parts, so that weight gradients fill bubbles"
    return why


def _shown(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
