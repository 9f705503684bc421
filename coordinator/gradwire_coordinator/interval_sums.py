"""What a segment between two possible cuts sends, receives and holds, for many pairs of cuts at once.

A value is sent once, and a tensor held once, however many nodes of a segment read it: sums over distinct items, which
two-dimensional running sums give for blocks of (starts × ends). Pure numpy. Leaves to others: what that costs
(`segment_costs.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from gradwire_coordinator.partition_problem import Floats, Integers, PartitionProblem


class _Pairs:
    """Weighted points (x, y) with x < y, for x from −1 and y below `units`."""

    def __init__(self, points: Iterable[tuple[int, int, float]], units: int) -> None:
        found = [point for point in points if point[2] > 0]
        found.sort(key=lambda point: point[1])
        self.x: Integers = np.array([x for x, _, _ in found], dtype=np.int64)
        self.y: Integers = np.array([y for _, y, _ in found], dtype=np.int64)
        # Bytes: sums below 2^53 are exact.
        self.weight: Floats = np.array([weight for _, _, weight in found], dtype=np.float64)
        # Weight of the points with x, or y, below a place.
        self.x_below = _running(self.x + 1, self.weight, units + 1)
        self.y_below = _running(self.y + 1, self.weight, units + 1)
        self._order_of_y = np.searchsorted(self.y, np.arange(units + 1))

    def below(self, starts: slice, ends: slice) -> Floats:  # (starts, ends)
        """Return the weight of the points with x < start and y < end."""
        # Points with y before the first start are below all starts, and below all ends.
        before = self.y_below[starts.start]
        items = self.ending_in(starts.start, ends.stop - 1)
        rows, columns = starts.stop - starts.start, ends.stop - ends.start
        row = np.maximum(self.x[items] + 1 - starts.start, 0)
        column = np.maximum(self.y[items] + 1 - ends.start, 0)
        inside = row < rows
        flat = np.bincount(
            row[inside] * columns + column[inside], weights=self.weight[items][inside], minlength=rows * columns
        )
        # Of no items, bincount makes integers.
        table: Floats = flat.astype(np.float64, copy=False).reshape(rows, columns)
        np.cumsum(table, axis=0, out=table)
        np.cumsum(table, axis=1, out=table)
        table += before
        return table

    def ending_in(self, start: int, end: int) -> slice:
        """Return the points with start ≤ y < end."""
        return slice(self._order_of_y[start], self._order_of_y[end])


class Distinct:
    """Items that several units read: the weight of those that a segment reads, each once, and does not make itself."""

    def __init__(self, items: Iterable[tuple[int, Sequence[int], float]], units: int) -> None:
        """Items: (the unit that makes it, or −1; ascending units that read it; weight)."""
        self._pairs = _Pairs(
            (
                (before, here, weight)
                for made, read, weight in items
                for before, here in itertools.pairwise((made, *read))
                if before < here
            ),
            units,
        )

    def block(self, starts: slice, ends: slice) -> Floats:  # (starts, ends)
        """Return the weight for each segment of a block."""
        # An item counts at its first read in the segment: the read before it, or its maker, lies before the start.
        return self._pairs.below(starts, ends) - self._pairs.y_below[starts, None]

    def of(self, start: int, end: int) -> float:
        """Return the weight for one segment."""
        items = self._pairs.ending_in(start, end)
        return float(self._pairs.weight[items][self._pairs.x[items] < start].sum())

    @cached_property
    def of_units(self) -> Floats:  # (units,)
        """The weight that single units read."""
        return np.diff(self._pairs.y_below)

    @cached_property
    def at_least(self) -> Floats:  # (units + 1,)
        """Running sum that a segment's weight is not below, where nobody makes the items: each at its first read."""
        first = self._pairs.x < 0
        return _running(self._pairs.y[first] + 1, self._pairs.weight[first], len(self._pairs.y_below))


class Sent:
    """Items that one unit makes and later ones read: the weight of those that a segment makes for what comes after."""

    def __init__(self, items: Iterable[tuple[int, int, float]], units: int) -> None:
        """Items: (the unit that makes it, the last that reads it, weight)."""
        self._pairs = _Pairs((item for item in items if item[0] < item[1]), units)
        self._by_made = np.argsort(self._pairs.x, kind="stable")
        self._made = self._pairs.x[self._by_made]
        self._last = self._pairs.y[self._by_made]
        self._weight = self._pairs.weight[self._by_made]
        # What is made before a place and read behind it.
        self.alive: Floats = self._pairs.x_below - self._pairs.y_below

    def block(self, starts: slice, ends: slice) -> Floats:  # (starts, ends)
        """Return the weight for each segment of a block."""
        made_before = self._pairs.x_below[starts, None] - self._pairs.below(starts, ends)
        return self.alive[ends] - made_before

    def of(self, start: int, end: int) -> float:
        """Return the weight for one segment."""
        first, last = np.searchsorted(self._made, (start, end))
        return float(self._weight[first:last][self._last[first:last] >= end].sum())

    @cached_property
    def of_units(self) -> Floats:  # (units,)
        """The weight that single units send: all that they make, since `_Pairs` has only what later ones read."""
        return np.diff(self._pairs.x_below)


class Units:
    """A graph between its possible cuts: unit u is what no cut parts, and segment (a, b) is units a to b − 1."""

    def __init__(self, problem: PartitionProblem, cuts: Sequence[int]) -> None:
        nodes = problem.seconds.shape[1]
        self.problem = problem
        self.ends: Integers = np.array([0, *cuts, nodes], dtype=np.int64)
        self.count = len(self.ends) - 1
        unit_of = np.searchsorted(self.ends, np.arange(nodes), side="right") - 1
        of_node: list[int] = unit_of.tolist()
        values = [
            (of_node[value.made], sorted({of_node[node] for node in value.read}), value) for value in problem.values
        ]
        inputs = [(-1, sorted({of_node[node] for node in value.read}), value) for value in problem.inputs]
        self.sent = Sent(((made, read[-1], value.size_bytes) for made, read, value in values), self.count)
        self.returned = Distinct(((made, read, value.gradient_bytes) for made, read, value in values), self.count)
        self.incoming = Distinct(((made, read, value.kept_bytes) for made, read, value in values + inputs), self.count)
        self._tensors = [(sorted({of_node[node] for node in tensor.read}), tensor) for tensor in problem.tensors]
        self.state = Distinct(((-1, read, tensor.total_bytes) for read, tensor in self._tensors), self.count)
        self.held = self._running(problem.held_bytes)
        self.transient = _RangeMaximum(self._largest(problem.transient_bytes))
        self._seconds: dict[tuple[int, bool], Floats] = {}

    def coarse(self, count: int) -> tuple[Units, list[int]]:
        """Return units of fewer possible cuts, about `count`, and where these are among this one's.

        Of as many neighbouring ones as take an equal share of nodes and time together, that with the fewest live bytes.
        """
        if self.count <= count:
            return self, list(range(self.count + 1))
        seconds = self.seconds(0, False)
        share = seconds[1:-1] / max(float(seconds[-1]), 1e-300) + np.arange(1, self.count) / self.count
        bucket = np.floor(share / 2 * (count - 1)).astype(np.int64)
        best = np.lexsort((self.sent.alive[1:-1], bucket))
        _, first = np.unique(bucket[best], return_index=True)
        kept = np.sort(best[first]) + 1
        return Units(self.problem, self.ends[kept].tolist()), [0, *kept.tolist(), self.count]

    @cached_property
    def _reads(self) -> tuple[Integers, Integers, Floats]:
        """The unit and the tensor of each read, and (weights, gradients, optimizer state) of each tensor."""
        pairs = [(unit, number) for number, (read, _) in enumerate(self._tensors) for unit in read]
        sizes = [(t.weight_bytes, t.gradient_bytes, t.optimizer_bytes) for _, t in self._tensors]
        unit, number = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return unit, number, np.array(sizes, dtype=np.float64).reshape(-1, 3)

    def tensors_of(self, segments: Iterable[tuple[int, int]]) -> tuple[int, int, int]:
        """Return bytes of (weights, gradients, optimizer state) of the tensors that any of these segments reads."""
        unit, number, sizes = self._reads
        held = np.zeros(len(sizes), dtype=bool)
        for start, end in segments:
            held[number[(start <= unit) & (unit < end)]] = True
        weights, gradients, optimizer = sizes[held].sum(axis=0).tolist()
        return int(weights), int(gradients), int(optimizer)

    def seconds(self, device: int, recomputes: bool) -> Floats:  # (units + 1,)
        """Return the seconds of all units before a place, on a device."""
        key = (device, recomputes)
        if key not in self._seconds:
            total = self._running(self.problem.seconds[device])
            if recomputes and self.problem.forward_seconds is not None:
                total = total + self._running(self.problem.forward_seconds[device])
            self._seconds[key] = total
        return self._seconds[key]

    def _running(self, of_nodes: Floats | Integers | None) -> Floats:  # (units + 1,)
        if of_nodes is None:
            return np.zeros(self.count + 1)
        total: Floats = np.concatenate([[0.0], np.cumsum(of_nodes, dtype=np.float64)])[self.ends]
        return total

    def _largest(self, of_nodes: Integers | None) -> Floats:  # (units,)
        if of_nodes is None:
            return np.zeros(self.count)
        found: Floats = np.maximum.reduceat(np.asarray(of_nodes, dtype=np.float64), self.ends[:-1])
        return found


class _RangeMaximum:
    """The maximum of any range of an array, by a table of the maxima of all ranges of 2^k."""

    def __init__(self, array: Floats) -> None:
        self.any = bool(array.any())
        count = len(array)
        # The largest k with 2^k ≤ a range's length; row k of the table has the maximum of 2^k from each place on.
        self._level = np.maximum(np.frexp(np.arange(count + 1))[1] - 1, 0)
        self._table = np.zeros((int(self._level[-1]) + 1, count))
        self._table[0] = array
        for level in range(1, len(self._table)):
            half, last = 2 ** (level - 1), count - 2**level + 1
            before = self._table[level - 1]
            self._table[level, :last] = np.maximum(before[:last], before[half : half + last])

    def block(self, starts: slice, ends: slice) -> Floats:  # (starts, ends)
        """Return the maxima from each start to each end; of an empty range, something."""
        first = np.arange(starts.start, starts.stop)[:, None]
        end = np.arange(ends.start, ends.stop)[None, :]
        level = self._level[np.maximum(end - first, 0)]
        last = self._table.shape[1] - 1
        found: Floats = np.maximum(
            self._table[level, np.minimum(first, last)], self._table[level, np.maximum(end - 2**level, 0)]
        )
        return found

    def of(self, start: int, end: int) -> float:
        """Return the maximum of one range."""
        return float(self._table[0, start:end].max()) if self.any else 0.0


def _running(places: Integers, weight: Floats, count: int) -> Floats:
    """Return the weight at or below each of `count` places."""
    found: Floats = np.cumsum(np.bincount(places, weights=weight, minlength=count), dtype=np.float64)
    return found
