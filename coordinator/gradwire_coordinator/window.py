"""The open entries of a run: whose report is missing, and how the reports of an entry become its result.

No threads, no sockets; the time is handed in. Leaves to others: dispatch (`run.py`), and what entries are valid
(`entries.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import run_pb2


@dataclass
class _Open:
    """An entry that some server has not finished."""

    entry: run_pb2.Entry
    dispatched_at: float
    # When the first server can have started it.
    started_at: float = math.inf
    # By position of the server.
    reports: dict[int, run_pb2.EntryReport] = field(default_factory=dict)


class Window:
    """The entries that were dispatched and are not finished, oldest first."""

    def __init__(
        self,
        servers: Sequence[str],
        *,
        loss_from: Mapping[int, int],
        loss_copies: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """servers: identifiers of the run's servers, by position.

        loss_from: positions of the last stage's servers, each with its replica, of whose micro-batches it has the loss.
        loss_copies: likewise, of those that report the same losses again, as other shards do: these do not count.
        """
        self._servers = list(servers)
        self._loss_from = dict(loss_from)
        self._reports_losses = {**loss_from, **loss_copies}
        self._open: deque[_Open] = deque()
        # When the oldest open entry became the oldest.
        self._oldest_since = -math.inf
        # When each server finished its last entry, by position.
        self._idle_since = [-math.inf] * len(servers)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, entry: run_pb2.Entry, now: float) -> None:
        """Take in an entry that goes to all servers now."""
        if not self._open:
            self._oldest_since = now
        self._open.append(_Open(entry, now))

    def owed_by(self, position: int) -> run_pb2.Entry | None:
        """Return the oldest entry that a server has not reported; None if it owes nothing."""
        return next((item.entry for item in self._open if position not in item.reports), None)

    def owed_seconds(self, position: int, now: float) -> float:
        """Return how long ago the oldest entry that a server has not reported was dispatched; 0 if none."""
        return next((now - item.dispatched_at for item in self._open if position not in item.reports), 0.0)

    def oldest(self, now: float) -> tuple[run_pb2.Entry, float] | None:
        """Return the oldest open entry, and for how many seconds it has been that; None if none is open."""
        return (self._open[0].entry, now - self._oldest_since) if self._open else None

    def report(
        self, position: int, report: run_pb2.EntryReport, now: float
    ) -> tuple[run_pb2.Entry, run_pb2.EntryResult] | None:
        """Take in a server's report; return the oldest entry with its result if that is complete now.

        FrameError if it is not the report that the server owes.
        """
        owed = next((item for item in self._open if position not in item.reports), None)
        if owed is None:
            raise FrameError("A server reported an entry that it was not sent", got=f"entry {report.entry}")
        _check(report, owed.entry, self._reports_losses.get(position))
        owed.reports[position] = report
        owed.started_at = min(owed.started_at, max(owed.dispatched_at, self._idle_since[position]))
        self._idle_since[position] = now
        if len(owed.reports) < len(self._servers):
            return None
        # Every server reports in order, so the entry that is complete first is the oldest.
        self._open.popleft()
        self._oldest_since = now
        reports = [(server, owed.reports[place]) for place, server in enumerate(self._servers)]
        losses = [part for place in self._loss_from for part in owed.reports[place].losses]
        return owed.entry, merge_reports(owed.entry, reports, losses, now - owed.started_at)


def merge_reports(
    entry: run_pb2.Entry,
    reports: Sequence[tuple[str, run_pb2.EntryReport]],
    losses: Iterable[run_pb2.LossPart],
    seconds: float,
) -> run_pb2.EntryResult:
    """Return the result of an entry from (server, report) of all servers, by position, and each micro-batch's loss.

    The loss is the sum of the parts' sums, divided once by the sum of their weights, in micro-batch order; NaN where
    the weights add up to nothing, as torch has it for a batch that is masked out.
    """
    result = run_pb2.EntryResult(
        entry=entry.number,
        seconds=seconds,
        weight_version=min(report.weight_version for _, report in reports),
        timings={server: report.timing for server, report in reports},
    )
    parts = sorted(losses, key=lambda part: part.micro_batch)
    if parts:
        result.weight = sum(part.weight for part in parts)
        result.loss = sum(part.sum for part in parts) / result.weight if result.weight else math.nan
    # Whoever clips knows it, and all of them the same.
    norm = next((report.gradient_norm for _, report in reports if report.HasField("gradient_norm")), None)
    if norm is not None:
        result.gradient_norm = norm
    return result


def _expected_losses(entry: run_pb2.Entry, replica: int) -> list[int]:
    """Return the micro-batches whose losses a replica's last stage reports for an entry."""
    kind = entry.WhichOneof("kind")
    if kind == "train_step":
        parts = entry.train_step.micro_batches
    elif kind == "evaluate":
        parts = entry.evaluate.micro_batches
    else:
        return []
    return [part.index for part in parts if part.replica == replica]


def _check(report: run_pb2.EntryReport, entry: run_pb2.Entry, loss_of: int | None) -> None:
    """FrameError unless a report is the one that its server owes for this entry.

    loss_of: the replica whose losses it reports; None: it reports none.
    """
    if (report.entry, report.generation) != (entry.number, entry.generation):
        raise FrameError(
            "A server reported out of order",
            expected=f"entry {entry.number} of generation {entry.generation}",
            got=f"entry {report.entry} of generation {report.generation}",
        )
    parts = sorted(part.micro_batch for part in report.losses)
    wanted = [] if loss_of is None else _expected_losses(entry, loss_of)
    if parts != wanted:
        raise FrameError(
            f"A server reported the wrong losses for entry {entry.number}",
            expected=f"one each for {len(wanted)} micro-batches",
            got=f"micro-batches {parts[:20]}",
        )
