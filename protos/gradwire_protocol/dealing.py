"""Which replica takes which micro-batch of a step: dealt out by the client, and counted with by the planner. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def deal(count: int, shares: Sequence[float]) -> list[int]:
    """Return the replica of each of so many micro-batches.

    shares: of each replica, adding up to 1. Each gets its share of them, up to rounding (largest remainder), spread
    evenly over the step, so that all are fed alike; of equal shares micro-batch i goes to replica i mod replicas.
    """
    counts = _counts(count, shares)
    places = [((place + 0.5) / own, replica) for replica, own in enumerate(counts) for place in range(own)]
    return [replica for _, replica in sorted(places)]


def _counts(count: int, shares: Sequence[float]) -> list[int]:
    counts = [math.floor(count * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda replica: (counts[replica] - count * shares[replica], replica))
    for place in range(count - sum(counts)):
        counts[by_remainder[place % len(shares)]] += 1
    return counts
