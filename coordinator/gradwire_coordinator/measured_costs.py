"""What a stage server measured of a graph's groups of nodes: checked, made affine in the rows, and shared out to nodes.

Pure. Leaves to others: asking for it (`cost_book.py`), and what the shapes say (`costs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import stage_pb2

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Measured numbers hold for so many times more or fewer rows than they were measured with.
_REACH = 2


class Cost(IntEnum):
    """What is measured: seconds of the forward and of both parts of the backward, and the bytes held between them."""

    FORWARD = 0
    INPUT_GRADIENT = 1
    WEIGHT_GRADIENT = 2
    HELD_BYTES = 3


class ActionSeconds(NamedTuple):
    """What an action takes beside its nodes: F, B or I, and W; a message taken in from another server, and one sent."""

    forward: float
    backward: float
    weight_gradient: float
    receive: float
    send: float


NOTHING_BESIDE = ActionSeconds(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class MeasuredGroups:
    """Costs of groups of nodes, as fixed + per_row × rows, neither below 0. Arrays are (costs, groups), of Cost."""

    # Where groups end; the last is the number of nodes.
    ends: tuple[int, ...]
    # The numbers of rows that were measured, ascending.
    rows: tuple[int, ...]
    fixed: Floats
    per_row: Floats
    # (groups,); the others' costs have no meaning.
    is_measured: npt.NDArray[np.bool_]
    action: ActionSeconds

    def covers(self, rows: int) -> bool:
        """Whether so many rows are near enough to what was measured."""
        return self.rows[0] <= rows * _REACH and rows <= self.rows[-1] * _REACH

    def share_out(self, cost: Cost, rows: int, estimate: Floats, otherwise: Floats | None = None) -> Floats:
        """Return a cost of each node, for so many rows: its group's, shared out in proportion to `estimate`.

        Where that is 0 for a whole group, in proportion to `otherwise`; without it, there is none. Where nothing was
        measured the estimate stands, multiplied by what it is wrong by elsewhere.
        """
        of_group = self.fixed[cost] + self.per_row[cost] * rows
        sizes = np.diff([0, *self.ends])
        estimated = self._sums(estimate)
        shares = _divide(estimate, np.repeat(estimated, sizes))
        if otherwise is not None:
            fallback = _divide(otherwise, np.repeat(self._sums(otherwise), sizes))
            shares = np.where(np.repeat(estimated > 0, sizes), shares, fallback)
        told = self.is_measured & (estimated > 0)
        scale = float(of_group[told].sum() / estimated[told].sum()) if told.any() else 1.0
        as_measured = shares * np.repeat(of_group, sizes)
        found: Floats = np.where(np.repeat(self.is_measured, sizes), as_measured, estimate * scale)
        return found

    def _sums(self, nodes: Floats) -> Floats:
        sums: Floats = np.add.reduceat(nodes, [0, *self.ends[:-1]])
        return sums


def _divide(part: Floats, whole: Floats) -> Floats:
    found: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return found


def read_reply(
    ends: Sequence[int], rows: Sequence[int], reply: stage_pb2.MeasureCostsReply, server: str
) -> MeasuredGroups:
    """Return what a server measured when it was asked for these groups and numbers of rows; FrameError if it is not."""
    by_rows = {measured.rows: measured.groups for measured in reply.measured}
    shape = [len(by_rows.get(count, ())) for count in rows]
    if shape != [len(ends)] * len(rows):
        raise FrameError(
            f"{server} measured other things than it was asked for",
            expected=f"{len(ends)} groups for {list(rows)} rows",
            got=f"{shape} groups",
        )
    numbers = np.array(
        [
            [
                (group.forward_seconds, group.input_gradient_seconds, group.weight_gradient_seconds, group.held_bytes)
                for group in by_rows[count]
            ]
            for count in sorted(rows)
        ]
    )  # (rows, groups, costs)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise FrameError(f"{server} measured nothing sensible", expected="finite numbers, none negative")
    measured = np.array([[not group.failure for group in by_rows[count]] for count in sorted(rows)])
    made = reply.action
    action = ActionSeconds(
        made.forward_seconds,
        made.input_gradient_seconds,
        made.weight_gradient_seconds,
        made.receive_seconds,
        made.send_seconds,
    )
    if not all(math.isfinite(seconds) and seconds >= 0 for seconds in action):
        raise FrameError(f"{server} measured nothing sensible of an action", expected="finite numbers, none negative")
    fixed, per_row = fit(sorted(rows), numbers.transpose(0, 2, 1), measured)
    return MeasuredGroups(tuple(ends), tuple(sorted(rows)), fixed, per_row, np.logical_or.reduce(measured), action)


def average(several: Sequence[MeasuredGroups]) -> MeasuredGroups:
    """Return what servers of one make have measured at the same time, of the same groups and rows, on the average."""
    first = several[0]
    weights = np.stack([each.is_measured for each in several]).astype(np.float64)
    total = weights.sum(axis=0)
    shares = _divide(weights, np.broadcast_to(total, weights.shape))
    fixed, per_row = (
        np.einsum("scg,sg->cg", np.stack(parts), shares)
        for parts in ([each.fixed for each in several], [each.per_row for each in several])
    )
    action = ActionSeconds(*(float(np.mean(part)) for part in zip(*(each.action for each in several), strict=True)))
    return MeasuredGroups(first.ends, first.rows, fixed, per_row, total > 0, action)


def fit(rows: Sequence[int], numbers: Floats, measured: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return (fixed, per row) of costs, neither below 0, that are exact for the most rows that were measured.

    rows: ascending. numbers: (rows, costs, groups). measured: (rows, groups); the others' numbers do not count. Where
    only one number of rows was measured, costs are in proportion to them.
    """
    fixed, per_row = np.zeros(numbers.shape[1:]), np.zeros(numbers.shape[1:])
    for group in range(numbers.shape[2]):
        known = np.flatnonzero(measured[:, group])
        if not len(known):
            continue
        most, least = known[-1], known[0]
        at_most, at_least = numbers[most, :, group], numbers[least, :, group]
        slope = (at_most - at_least) / (rows[most] - rows[least]) if most != least else at_most / rows[most]
        # A slope above this would make the fixed part negative.
        per_row[:, group] = np.clip(slope, 0.0, at_most / rows[most])
        fixed[:, group] = np.maximum(0.0, at_most - per_row[:, group] * rows[most])
    return fixed, per_row


def failures(reply: stage_pb2.MeasureCostsReply) -> list[str]:
    """Return why groups could not be measured, each reason once."""
    return list(dict.fromkeys(group.failure for rows in reply.measured for group in rows.groups if group.failure))


def group_ends(forward_seconds: Floats, cuts: Sequence[int], *, least_seconds: float, most: int) -> list[int]:
    """Return where to end groups that take at least so long by an estimate, at allowed cuts; at most `most` groups."""
    running = np.concatenate([[0.0], np.cumsum(forward_seconds)])
    least = max(least_seconds, float(running[-1]) / most)
    ends: list[int] = []
    start = 0
    for cut in cuts:
        if running[cut] - running[start] >= least:
            ends.append(cut)
            start = cut
    # What remains is too little to be measured for itself.
    if ends and running[-1] - running[ends[-1]] < least:
        ends.pop()
    return [*ends, len(forward_seconds)]
