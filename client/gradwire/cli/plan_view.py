"""A plan on a terminal: tables of its stages, servers and candidates, the step as a picture, and why it is so.

Leaves to others: the picture itself (`timeline_drawing.py`), and the short form (`str` of a RunPlan).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gradwire.boundaries import boundary_lines
from gradwire.run_plan import Candidate, PlannedStage, RunPlan, module_names, replica_lines
from gradwire.timeline_drawing import text_timeline
from gradwire.units import bytes_unit, seconds_unit, shown_seconds

_BITS, _MEGA = 8, 1e6
# A step that takes so much longer is said to.
_NOTABLE = 0.0005
# Of tables, in columns of the terminal.
_GAP, _BROKEN_TEXT = 2, 14


def plan_view(plan: RunPlan, name: str, console: Console) -> Iterator[RenderableType]:
    """Yield what to print, from top to bottom. name: of the model."""
    yield Text.assemble((name, "bold"), f": {_layout(plan)}")
    yield Text.assemble(
        ("expected: ", "dim"),
        (f"{shown_seconds(plan.predicted.seconds)} a step", "bold"),
        f", bubble {plan.predicted.bubble:.1%}, {_above_bound(plan):.1%} above the lower bound of any order",
    )
    yield _stages(plan, console.width)
    if plan.servers:
        yield _servers(plan, console.width)
    if plan.timeline:
        yield _title("The step as expected")
        colours = console.color_system is not None and not console.no_color
        yield text_timeline(plan.timeline, console.width, colours=colours)
    if plan.candidates:
        yield _candidates(plan, console.width)


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """Yield why the plan is as it is, a sentence a line."""
    if plan.reason:
        yield f"why: {plan.reason}"
    yield _how_good_cuts_are(plan)
    yield _where_costs_are_from(plan)
    yield from _link_lines(plan)
    yield from boundary_lines(plan)
    yield from replica_lines(plan)


def _link_lines(plan: RunPlan) -> Iterator[str]:
    """Yield a line for each two servers that speak to each other."""
    seen = set()
    for link in plan.links:
        first, second = plan.stages[link.stage].server, plan.stages[link.stage + 1].server
        if frozenset((first, second)) in seen:
            continue
        seen.add(frozenset((first, second)))
        there, back = (
            f"{rate * _BITS / _MEGA:,.0f} Mbit/s"
            for rate in (link.forward_bytes_per_second, link.backward_bytes_per_second)
        )
        yield (
            f"servers {first}→{second}: {there} there, {back} back, round trip "
            f"{shown_seconds(link.round_trip_seconds)}, "
            + ("measured" if link.measured else f"assumed: {link.reason or 'not measured'}")
        )


def picture_titles(plan: RunPlan, name: str) -> tuple[str, str]:
    """Return the title and the line below it of a picture of the step."""
    predicted = plan.predicted
    return (
        f"{name}: {_layout(plan)}",
        f"expected: {shown_seconds(predicted.seconds)} a step, bubble {predicted.bubble:.1%}",
    )


def _layout(plan: RunPlan) -> str:
    servers = plan.servers_each
    several = f" ({len(plan.stages)} stages)" if len(plan.stages) != servers else ""
    each = f"{plan.replicas} replicas of " if plan.replicas > 1 else ""
    own = f"{each}{servers} server{'s' * (servers != 1)}{several}"
    return f"{own}, {plan.micro_batches} micro-batches, schedule {plan.name}"


def _above_bound(plan: RunPlan) -> float:
    bound = plan.predicted.lower_bound_seconds
    return max(0.0, plan.predicted.seconds / bound - 1) if bound else 0.0


def _how_good_cuts_are(plan: RunPlan) -> str:
    if plan.partition_gap is None:
        return "cuts: as the plan says"
    if plan.partition_gap == 0:
        return "cuts: proven to make the busiest server as fast as it can be"
    return f"cuts: others make the busiest server at most {plan.partition_gap:.1%} faster"


def _where_costs_are_from(plan: RunPlan) -> str:
    if plan.cost_source == "measured":
        return "costs: nodes were profiled on the servers' kind of device"
    return "costs: nodes are estimated from their shapes and the devices' measured rates"


def _title(text: str) -> Text:
    return Text(f"\n{text}", "bold")


@dataclass(frozen=True)
class _Column:
    """A column of a table. expendable: how early it is left out, if the terminal is too narrow; 0: never."""

    name: str
    cells: Sequence[str]
    expendable: int = 0
    is_text: bool = False

    @property
    def width(self) -> int:
        """What it must have: text can be broken."""
        longest = max(map(len, (self.name, *self.cells)))
        return min(longest, _BROKEN_TEXT) if self.is_text else longest


def _table(title: str, columns: Sequence[_Column], width: int, styles: Sequence[str] = ()) -> Table:
    shown = list(columns)
    while sum(column.width + _GAP for column in shown) > width:
        column = max(shown, key=lambda each: each.expendable)
        if not column.expendable:
            break
        shown.remove(column)
    table = Table(title=_title(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.padding, table.header_style = (0, _GAP - 1, 0, 0), "dim"
    for column in shown:
        if column.is_text:
            table.add_column(column.name, overflow="fold", min_width=column.width)
        else:
            table.add_column(column.name, justify="right", no_wrap=True)
    for place, cells in enumerate(zip(*(column.cells for column in shown), strict=True)):
        table.add_row(*cells, style=styles[place] if styles else None)
    return table


def _stages(plan: RunPlan, width: int) -> Table:
    stages = plan.stages
    time = seconds_unit(max(stage.forward_seconds, stage.backward_seconds) for stage in stages)
    size = bytes_unit(_sent(stage) for stage in stages)
    modules = [module_names(plan, stage) for stage in stages]
    columns = [
        _Column("stage", [str(stage.stage) for stage in stages]),
        _Column("server", [str(stage.server) for stage in stages]),
        _Column("from", [first for first, _ in modules], is_text=True),
        _Column("to", [last for _, last in modules], is_text=True),
        _Column("nodes", [str(stage.nodes) for stage in stages], 3),
        _Column("parameters", [f"{stage.parameters:,}" for stage in stages]),
        _Column("F", [time.show(stage.forward_seconds) for stage in stages]),
        _Column("B", [time.show(stage.backward_seconds) for stage in stages]),
    ]
    if any(candidate.chosen and candidate.split_backwards for candidate in plan.candidates):
        columns += [
            _Column("I", [time.show(stage.input_gradient_seconds) for stage in stages], 1),
            _Column("W", [time.show(stage.weight_gradient_seconds) for stage in stages], 1),
        ]
    columns += [
        _Column("sends", [size.show(_sent(stage)) for stage in stages]),
        _Column("codec", [stage.codec if stage.stage < len(stages) - 1 else "" for stage in stages], 2, is_text=True),
    ]
    title = f"Stages: what one micro-batch takes ({time.name}), what they send in a step ({size.name})"
    return _table(title, columns, width)


def _sent(stage: PlannedStage) -> int:
    return stage.boundary_bytes + stage.returned_bytes


def _servers(plan: RunPlan, width: int) -> Table:
    servers = plan.servers
    unit = bytes_unit(server.peak_bytes for server in servers)
    step = plan.predicted.seconds
    columns = [
        *_replica_columns(plan),
        _Column("server", [str(server.position) for server in servers]),
        _Column("name", [server.server for server in servers], 3, is_text=True),
        _Column("device", [server.device for server in servers], 2, is_text=True),
        _Column("stages", [" ".join(map(str, server.stages)) for server in servers]),
        _Column("busy", [f"{server.busy_seconds / step:.0%}" if step else "" for server in servers]),
        _Column("weights", [unit.show(server.weight_bytes) for server in servers]),
        _Column("gradients", [unit.show(server.gradient_bytes) for server in servers], 1),
        _Column("optimizer", [unit.show(server.optimizer_bytes) for server in servers], 1),
        _Column("activations", [unit.show(server.activation_bytes) for server in servers]),
        _Column("in all", [unit.show(server.peak_bytes) for server in servers]),
        _Column("of", [unit.show(server.memory_bytes) if server.memory_bytes else "?" for server in servers]),
    ]
    return _table(f"Servers: what they hold at the peak ({unit.name})", columns, width)


def _replica_columns(plan: RunPlan) -> list[_Column]:
    """Return what tells the servers of replicas apart, and what their exchange takes, where there are several."""
    if plan.replicas == 1:
        return []
    time = seconds_unit(server.reduce_seconds for server in plan.servers)
    return [
        _Column("replica", [str(server.replica) for server in plan.servers]),
        _Column(f"reduce ({time.name})", [time.show(server.reduce_seconds) for server in plan.servers]),
    ]


def _candidates(plan: RunPlan, width: int) -> Table:
    found = plan.candidates
    time = seconds_unit(candidate.seconds for candidate in found)
    size = bytes_unit(max((*candidate.peak_bytes, 0)) for candidate in found)
    traffic = bytes_unit(candidate.traffic_bytes for candidate in found)
    fastest = min(candidate.seconds for candidate in found)
    more = [candidate.seconds / fastest - 1 if fastest else 0.0 for candidate in found]
    columns = [
        _Column("", ["→" if candidate.chosen else "" for candidate in found]),
        _Column("schedule", [candidate.name for candidate in found], is_text=True),
        _Column("stages", [_places(candidate) for candidate in found]),
        _Column(f"step ({time.name})", [time.show(candidate.seconds) for candidate in found]),
        _Column("more", [f"{share:.1%}" if share >= _NOTABLE else "" for share in more], 1),
        _Column("bubble", [f"{candidate.bubble:.1%}" for candidate in found]),
        _Column(f"peak ({size.name})", [size.show(max((*candidate.peak_bytes, 0))) for candidate in found]),
        _Column(f"traffic ({traffic.name})", [traffic.show(candidate.traffic_bytes) for candidate in found], 2),
        _Column("split", [str(candidate.split_backwards or "") for candidate in found], 3),
        _Column("fits", ["yes" if candidate.fits else "no" for candidate in found]),
    ]
    styles = ["bold" if candidate.chosen else "" if candidate.fits else "dim" for candidate in found]
    return _table("What was considered", columns, width, styles)


def _places(candidate: Candidate) -> str:
    """Return how many stages there are; and how they go over the servers, where these have several."""
    stages, servers = len(candidate.placement), 1 + max(candidate.placement, default=0)
    if stages <= servers:
        return str(stages)
    shape = "V" if candidate.placement[servers] == servers - 1 else "looped"
    return f"{stages}, {shape}"
