"""Where to cut the evaluate and predict graphs, so that their nodes follow the owners of the tensors they read.

Modes are baked in at export, so these graphs have other nodes than the train graph, and the train graph's cuts mean
nothing in them; the model's tensors they share. Leaves to others: cutting the train graph (`partition.py`), and making
segments (`segments.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from gradwire_coordinator.graph_index import GraphIndex
from gradwire_protocol.errors import PlanError


class _Cost(NamedTuple):
    """What a choice of cuts costs; compared in this order."""

    # Reads of a tensor that changes, by a stage that does not own it: impossible.
    forbidden: int = 0
    # Bytes of tensors that stages must hold additionally.
    copies: int = 0
    # Stages without a node.
    empty: int = 0
    # How far from the wanted cuts, in seconds.
    seconds: float = 0.0

    def plus(self, other: _Cost) -> _Cost:
        return _Cost(
            self.forbidden + other.forbidden,
            self.copies + other.copies,
            self.empty + other.empty,
            self.seconds + other.seconds,
        )

    def minus(self, other: _Cost) -> _Cost:
        return _Cost(
            self.forbidden - other.forbidden,
            self.copies - other.copies,
            self.empty - other.empty,
            self.seconds - other.seconds,
        )


class _Choice(NamedTuple):
    cost: _Cost
    start: int


def cuts_by_ownership(
    index: GraphIndex,
    cuts: Sequence[int],
    holders: Mapping[str, Collection[int]],
    tensor_bytes: Mapping[str, int],
    changing: Collection[str],
    stages: int,
    distance: Callable[[int, int], float],
) -> tuple[int, ...]:
    """Return stages − 1 positions out of `cuts` (and both ends of the graph), not descending.

    `holders` are the stages that hold each tensor already; a tensor that nobody holds may go anywhere. Where the last
    use of the earlier stages' tensors comes before the first use of the later ones', each cut falls between them.
    Otherwise the fewest bytes of additional copies decide; tensors in `changing` cannot have a copy, and PlanError says
    so. `distance(stage, cut)`: how far, in seconds, from the wanted end of this stage; decides among equals. A stage
    stays empty only where there are not enough cuts.
    """
    ends = [0, *cuts, len(index.graph.nodes)]
    before = _costs_before(index, ends, holders, tensor_bytes, changing, stages)
    # best[j]: the cheapest way in which the stages so far take the nodes before ends[j].
    best: list[_Choice | None] = [_Choice(_Cost(), 0), *[None] * (len(ends) - 1)]
    chosen: list[list[_Choice | None]] = []
    for stage in range(stages):
        reached: list[_Choice | None] = [None] * len(ends)
        cheapest: _Choice | None = None  # over all starts before this end: what came before, less this stage's costs
        for end, position in enumerate(ends):
            own = before[stage][end]
            wanted = _Cost(seconds=distance(stage, position) if stage < stages - 1 else 0.0)
            options = []
            if cheapest is not None:
                options.append(_Choice(cheapest.cost.plus(own), cheapest.start))
            previous = best[end]
            if previous is not None:
                options.append(_Choice(previous.cost.plus(_Cost(empty=1)), end))
                here = _Choice(previous.cost.minus(own), end)
                cheapest = here if cheapest is None else min(cheapest, here)
            if options:
                option = min(options)
                reached[end] = _Choice(option.cost.plus(wanted), option.start)
        best = reached
        chosen.append(reached)
    return _follow(index, ends, chosen, holders, changing)


def _costs_before(
    index: GraphIndex,
    ends: Sequence[int],
    holders: Mapping[str, Collection[int]],
    tensor_bytes: Mapping[str, int],
    changing: Collection[str],
    stages: int,
) -> list[list[_Cost]]:
    """Return, by stage and end, what it costs if that stage runs all nodes before that end."""
    reads: dict[int, list[str]] = {}
    for tensor, positions in index.tensor_positions().items():
        if holders.get(tensor):
            for position in positions:
                reads.setdefault(min(position, len(index.graph.nodes) - 1), []).append(tensor)
    found = []
    for stage in range(stages):
        running, costs, position = _Cost(), [], 0
        for end in ends:
            for here in range(position, end):
                for tensor in reads.get(here, ()):
                    if stage not in holders[tensor]:
                        more = _Cost(forbidden=1) if tensor in changing else _Cost(copies=tensor_bytes[tensor])
                        running = running.plus(more)
            position = end
            costs.append(running)
        found.append(costs)
    return found


def _follow(
    index: GraphIndex,
    ends: Sequence[int],
    chosen: Sequence[Sequence[_Choice | None]],
    holders: Mapping[str, Collection[int]],
    changing: Collection[str],
) -> tuple[int, ...]:
    end = len(ends) - 1
    last = chosen[-1][end]
    if last is None or last.cost.forbidden:
        owned = sorted(tensor for tensor in index.tensor_positions() if tensor in changing and holders.get(tensor))
        raise PlanError(
            f"The {index.name} graph cannot be cut so that the buffers that training changes stay with their stages",
            expected="each of these buffers read by the stage that changes it",
            got=", ".join(f"{name} (stage {min(holders[name])})" for name in owned[:5]),
            remedy="use fewer stages, or other cuts, so that the modules with these buffers share a stage",
        )
    found: list[int] = []
    for choices in reversed(chosen):
        choice = choices[end]
        if choice is None:  # every choice names a start that has been reached
            raise PlanError("The graph cannot be cut")
        end = choice.start
        found.append(ends[end])
    return tuple(reversed(found[:-1]))
