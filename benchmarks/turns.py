"""Contenders that stand ready side by side and take turns, round after round, on the work of peers.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

from peers import TOKENS_A_STEP

# Runs so many steps, and returns the seconds that they take.
Contender = Callable[[int], float]
# Tokens a second, by contender and round.
Speeds = dict[str, list[float]]


def take_turns(contenders: Mapping[str, Contender], rounds: int, steps: int) -> Speeds:
    """Return tokens a second, by round."""
    found: Speeds = {name: [] for name in contenders}
    for contender in contenders.values():
        contender(1)
    for number in range(rounds):
        # Forwards and backwards, so that no one always comes behind the same other.
        for name, contender in list(contenders.items())[:: 1 if number % 2 else -1]:
            found[name].append(steps * TOKENS_A_STEP / contender(steps))
    return found


def speed_ratio(speeds: Speeds, name: str, to: str) -> float:
    """Return the median over rounds of one contender's speed by another's; NaN where that was not measured."""
    if name not in speeds or to not in speeds:
        return math.nan
    return statistics.median(a / b for a, b in zip(speeds[name], speeds[to], strict=True))
