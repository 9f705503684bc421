"""Where to cut a graph so that its slowest stage is as fast as it can be, exactly, by dynamic programming.

Pure: costs come in (`costs.py`), cuts go out. Leaves to others: which server takes which stage; the order of the
devices is given. Values from one stage to several are counted once, since a cut's place does not tell their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gradwire_coordinator.costs import LINK_BYTES_PER_SECOND, TravellingValue
from gradwire_protocol.errors import PlanError

# Relative; sums of the same numbers in another order are ties.
_TIE = 1e-12

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def partition(
    seconds: Floats,  # (stages, nodes)
    values: Sequence[TravellingValue],
    cuts: Sequence[int],
    *,
    link_bytes_per_second: float = LINK_BYTES_PER_SECOND,
) -> tuple[int, ...]:
    """Return the stages − 1 cuts, out of `cuts` (ascending), that minimise the seconds of the slowest stage.

    A stage's seconds are those of its nodes on its device, plus the transfer of what it sends: values forward, and
    gradients back. Among partitions that are equally fast the one whose values have the fewest bytes is chosen.
    PlanError if there are not enough cuts.
    """
    stages, nodes = seconds.shape
    check_stage_count(stages, cuts)
    ends = np.array([0, *cuts, nodes], dtype=np.int64)
    total = np.concatenate([np.zeros((stages, 1)), np.cumsum(seconds, axis=1)], axis=1)[:, ends]  # (stages, ends)

    def stage_seconds(end: int, sent: Integers, returned: Integers) -> Floats:  # (stages, starts)
        transfer = (sent + returned) / link_bytes_per_second
        own: Floats = total[:, end : end + 1] - total[:, :end]
        return own + transfer

    # slowest[k, b]: the least time of the slowest of the first k stages, if they end at end b.
    slowest = np.full((stages + 1, len(ends)), np.inf)
    slowest[0, 0] = 0.0
    for end, sent, returned in _traffic(ends, values):
        cost = stage_seconds(end, sent, returned)
        slowest[1:, end] = np.maximum(slowest[:-1, :end], cost).min(axis=1)
    limit = slowest[stages, -1] * (1 + _TIE)

    # Of the partitions within this limit, the fewest bytes.
    fewest = np.full((stages + 1, len(ends)), np.inf)
    fewest[0, 0] = 0.0
    start_of = np.zeros((stages + 1, len(ends)), dtype=np.int64)
    for end, sent, returned in _traffic(ends, values):
        within = stage_seconds(end, sent, returned) <= limit
        candidates = np.where(within, fewest[:-1, :end] + sent, np.inf)
        start_of[1:, end] = candidates.argmin(axis=1)
        fewest[1:, end] = candidates.min(axis=1)
    chosen, end = [], len(ends) - 1
    for stage in range(stages, 1, -1):
        end = int(start_of[stage, end])
        chosen.append(int(ends[end]))
    return tuple(reversed(chosen))


def check_stage_count(stages: int, cuts: Sequence[int]) -> None:
    """PlanError if a graph with these allowed cuts cannot have so many stages."""
    if stages > len(cuts) + 1:
        raise PlanError(
            f"The model cannot be cut into {stages} stages",
            expected=f"at most {len(cuts) + 1} stages: its graph can be cut at {len(cuts)} places",
            got=f"{stages} stages",
            remedy=f"set stages to {len(cuts) + 1} or less",
        )


def check_cuts(chosen: Sequence[int], stages: int, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return the cuts that a user chose; PlanError unless they are ascending, allowed, and one fewer than stages."""
    if len(chosen) != stages - 1:
        raise PlanError(
            "The number of cuts does not fit the number of stages",
            expected=f"{stages - 1} cuts for {stages} stages",
            got=f"{len(chosen)} cuts: {list(chosen)[:20]}",
            remedy="leave cuts empty to have them balanced",
        )
    if any(a >= b for a, b in itertools.pairwise(chosen)):
        raise PlanError(
            "Cuts must ascend, so that every stage has a node", expected="ascending", got=str(list(chosen)[:20])
        )
    for cut in chosen:
        if cut not in cuts:
            below = max((allowed for allowed in cuts if allowed < cut), default=None)
            above = min((allowed for allowed in cuts if allowed > cut), default=None)
            near = [str(allowed) for allowed in (below, above) if allowed is not None]
            raise PlanError(
                f"The graph cannot be cut at node {cut}",
                expected="a position where no in-place operator, tuple or buffer that changes is split",
                got=str(cut),
                remedy=f"the nearest allowed: {' and '.join(near) or 'none'}; or leave cuts empty",
            )
    return tuple(chosen)


def _traffic(ends: Integers, values: Sequence[TravellingValue]) -> Iterator[tuple[int, Integers, Integers]]:
    """Yield (b, sent, returned) for each end b: the bytes that a stage from start a to b sends, for each a < b.

    Sent: of values made in it and read behind it. Returned: of gradients of values made before it and read in it. Both
    are kept up to date from end to end, so that all pairs take O(ends²) steps and O(ends) memory.
    """
    count = len(ends)
    # The interval between two ends that a node is in.
    interval = np.searchsorted(ends, np.arange(ends[-1]), side="right") - 1
    made_here: list[list[TravellingValue]] = [[] for _ in range(count)]
    last_read_here: list[list[TravellingValue]] = [[] for _ in range(count)]
    # (first start, last start, bytes): stages that start there and reach over this interval return a gradient.
    read_here: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    for value in values:
        made = int(interval[value.made])
        made_here[made].append(value)
        last_read_here[int(interval[value.read[-1]])].append(value)
        before = made
        for position in value.read:
            here = int(interval[position])
            if here > before:
                read_here[here].append((before + 1, here, value.gradient_bytes))
                before = here
    alive = np.zeros(count, dtype=np.int64)  # bytes that are read behind the end, by the interval that makes them
    change = np.zeros(count + 1, dtype=np.int64)  # of the returned bytes, from start to start
    for end in range(1, count):
        for value in made_here[end - 1]:
            alive[end - 1] += value.size_bytes
        for value in last_read_here[end - 1]:
            alive[interval[value.made]] -= value.size_bytes
        for first, last, size in read_here[end - 1]:
            change[first] += size
            change[last + 1] -= size
        sent = np.cumsum(alive[:end][::-1])[::-1]
        yield end, sent, np.cumsum(change[:end])
