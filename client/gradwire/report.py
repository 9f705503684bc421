"""Predicted beside measured: what `trainer.report()` returns, and what follows from the difference.

Pure: makes values of a plan and of measured steps. Leaves to others: collecting steps (`measured_steps.py`), and acting
on it (`trainer.replan()`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gradwire.measured_steps import MeasuredStep
from gradwire.report_findings import find
from gradwire.report_values import Compared, ServerReport
from gradwire.run_plan import RunPlan
from gradwire.units import seconds_unit, shown_bytes, shown_seconds
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.program import INPUT_GRADIENT

_COMPUTING = ("forward", "backward", "weight", "update")
# Of a step: below it no ratio is shown.
_LEAST_SHARE = 0.01
_HEAD = ("server", "stages", "forward", "backward", "update", "other work", "waits", "waits most for")


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """Steps as the plan predicted them, and as they were. `print` shows it as a table.

    first_step, last_step, steps: those that were measured, and how many. seconds: of a step, on average. bubble: idle
    share, averaged over servers; predicted by simulation. theoretical_bubble: of the schedule with stages that take
    equally long. traffic_bytes: between servers in a step, as predicted. rows: of a batch. findings: what differs most,
    and what to do, the most important first.
    """

    first_step: int
    last_step: int
    steps: int
    rows: Compared
    seconds: Compared
    bubble: Compared
    theoretical_bubble: float
    traffic_bytes: int
    cost_source: str
    servers: tuple[ServerReport, ...]
    findings: tuple[str, ...]

    def to_record(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return dataclasses.asdict(self)

    def headline(self) -> str:
        """Return steps and bubble in one line."""
        span = f"step {self.first_step}" if self.steps == 1 else f"steps {self.first_step} to {self.last_step}"
        return (
            f"{span}: {shown_seconds(self.seconds.measured)} a step, {shown_seconds(self.seconds.predicted)} "
            f"predicted; bubble {self.bubble.measured:.1%}, {self.bubble.predicted:.1%} simulated, "
            f"{self.theoretical_bubble:.1%} in theory"
        )

    def __repr__(self) -> str:
        return f"<Report: {self.headline()}>"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield self.headline()
        seconds = [part for server in self.servers for part in _shown(server)]
        unit = seconds_unit(seconds)

        def cell(pair: Compared) -> str:
            # The ratio of what is next to nothing says nothing.
            matters = max(pair.predicted, pair.measured) >= _LEAST_SHARE * self.seconds.measured
            ratio = f" ({pair.ratio:.2f}×)" if pair.ratio is not None and matters else ""
            return f"{unit.show(pair.predicted)} → {unit.show(pair.measured)}{ratio}"

        rows = [self._row(_HEAD, "replica", "shard")]
        for server in self.servers:
            longest = max(server.waits, key=lambda wait: server.waits[wait], default="")
            cells = (
                server.server,
                " ".join(map(str, server.stages)),
                cell(server.forward),
                cell(server.backward),
                cell(server.update),
                unit.show(server.transfer_seconds),
                f"{unit.show(server.idle_seconds)} ({server.idle_seconds / server.window_seconds:.0%})"
                if server.window_seconds
                else "",
                longest.removeprefix("wait-"),
            )
            rows.append(self._row(cells, str(server.replica), str(server.shard)))
        yield from _aligned(rows)
        yield (
            f"({unit.name} a step, predicted → measured; costs were {self.cost_source or 'estimated'}; "
            f"{shown_bytes(self.traffic_bytes)} travel between servers in a step, as predicted)"
        )
        for finding in self.findings:
            yield f"• {finding}"

    def _row(self, cells: Sequence[str], replica: str, shard: str) -> tuple[str, ...]:
        """Return a row of the table, with cells for the replica and the shard where there are several."""
        first, *others = cells
        more = [
            cell
            for cell, of_servers in (
                (replica, [server.replica for server in self.servers]),
                (shard, [server.shard for server in self.servers]),
            )
            if any(each is not None for each in of_servers)
        ]
        return (first, *more, *others)


def make_report(
    plan: RunPlan, steps: Sequence[MeasuredStep], servers: Sequence[str], *, rows: int, recompute: bool = False
) -> Report:
    """Compare a plan with the steps that its layout has carried out.

    servers: identifiers, by replica, then position, then shard. rows: of the batch that the plan expects.
    recompute: forwards are run again for their backwards. SettingsError if there are no steps.
    """
    if not steps:
        raise SettingsError(
            "There is nothing to report yet",
            expected="two finished training steps at least: the first one of a layout warms up, and does not count",
            got="fewer",
            remedy="train some steps first",
        )
    # As the prediction has it: a batch may have fewer rows than the plan has micro-batches.
    count = min(plan.micro_batches, rows)
    made = tuple(_server(plan, steps, count, place, server) for place, server in enumerate(servers))
    seconds = Compared(plan.predicted.seconds, fmean(step.seconds for step in steps))
    bubble = Compared(plan.predicted.bubble, fmean(step.bubble for step in steps))
    of_rows = Compared(float(rows), fmean(step.rows for step in steps))
    return Report(
        first_step=steps[0].step,
        last_step=steps[-1].step,
        steps=len(steps),
        rows=of_rows,
        seconds=seconds,
        bubble=bubble,
        theoretical_bubble=plan.theoretical_bubble_ratio,
        traffic_bytes=sum(candidate.traffic_bytes for candidate in plan.candidates if candidate.chosen),
        cost_source=plan.cost_source,
        servers=made,
        findings=tuple(find(plan, made, seconds=seconds, bubble=bubble, rows=of_rows, recompute=recompute)),
    )


def _server(plan: RunPlan, steps: Sequence[MeasuredStep], micro_batches: int, place: int, server: str) -> ServerReport:
    """micro_batches: of a step, over all replicas. place: of the server in the run's list."""
    pipeline, shard = divmod(place, plan.shards)
    replica, position = divmod(pipeline, plan.positions)
    times = [step.servers[server] for step in steps if server in step.servers]
    count = max(1, len(times))

    def mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        totals: Counter[str] = Counter()
        for part in parts:
            totals.update(part)
        return {name: total / count for name, total in totals.items()}

    busy, waits = mean([time.busy for time in times]), mean([time.idle for time in times])
    forward, backward = _predicted(plan, position, plan.micro_batches_of(replica, micro_batches))
    own = (replica, position, shard)
    update = sum(each.update_seconds for each in plan.servers if (each.replica, each.position, each.shard) == own)
    return ServerReport(
        position=position,
        replica=replica if plan.replicas > 1 else None,
        shard=shard if plan.shards > 1 else None,
        server=server,
        stages=tuple(stage.stage for stage in plan.stages if stage.server == position),
        forward=Compared(forward, busy.get("forward", 0.0)),
        backward=Compared(backward, busy.get("backward", 0.0) + busy.get("weight", 0.0)),
        update=Compared(update, busy.get("update", 0.0)),
        transfer_seconds=sum(seconds for phase, seconds in busy.items() if phase not in _COMPUTING),
        waits=waits,
        window_seconds=sum(time.window for time in times) / count,
    )


def _predicted(plan: RunPlan, position: int, micro_batches: int) -> tuple[float, float]:
    """Return what a step's forwards and backwards are expected to take a server, whole or in two parts."""
    split = Counter(item.action.stage for item in plan.timeline if item.action.kind == INPUT_GRADIENT)
    forward = backward = 0.0
    for stage in plan.stages:
        if stage.server == position:
            forward += stage.forward_seconds * micro_batches
            backward += stage.backward_seconds * (micro_batches - split[stage.stage])
            backward += (stage.input_gradient_seconds + stage.weight_gradient_seconds) * split[stage.stage]
    return forward, backward


def _shown(server: ServerReport) -> Iterator[float]:
    for pair in (server.forward, server.backward, server.update):
        yield from (pair.predicted, pair.measured)
    yield from (server.transfer_seconds, server.idle_seconds)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.ljust(width) if place in (0, len(row) - 1) else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()
