"""A plan on a terminal: tables of its stages, servers and candidates, the step as a picture, and why it is so.

Leaves to others: the picture itself (`timeline_drawing.py`), and the short form (`str` of a RunPlan).
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from gradwire.boundaries import boundary_lines
from gradwire.cli.tables import Column, table, title_text
from gradwire.planned_parts import Candidate, PlannedStage
from gradwire.planned_tensor import PlannedTensor
from gradwire.run_plan import RunPlan, grid_lines, module_names
from gradwire.timeline_drawing import text_timeline
from gradwire.units import bytes_unit, seconds_unit, shown_seconds

_BITS, _MEGA = 8, 1e6
# A step that takes so much longer is said to.
_NOTABLE = 0.0005


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
    if plan.tensor is not None and plan.tensor.parameters:
        yield _split_parameters(plan.tensor, console.width)
    if plan.timeline:
        yield title_text("The step as expected")
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
    yield from grid_lines(plan)


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
    each = f" of {plan.shards} servers{' each' * (len(plan.stages) > 1)}" if plan.shards > 1 else ""
    stages = f"{len(plan.stages)} stage{'s' * (len(plan.stages) != 1)}"
    several = f" ({stages}{each})" if each or len(plan.stages) != servers else ""
    copies = f"{plan.replicas} replicas of " if plan.replicas > 1 else ""
    own = f"{copies}{servers} server{'s' * (servers != 1)}{several}"
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


def _stages(plan: RunPlan, width: int) -> Table:
    stages = plan.stages
    time = seconds_unit(max(stage.forward_seconds, stage.backward_seconds) for stage in stages)
    size = bytes_unit(_sent(stage) for stage in stages)
    modules = [module_names(plan, stage) for stage in stages]
    columns = [
        Column("stage", [str(stage.stage) for stage in stages]),
        Column("server", [str(stage.server) for stage in stages]),
        Column("from", [first for first, _ in modules], is_text=True),
        Column("to", [last for _, last in modules], is_text=True),
        Column("nodes", [str(stage.nodes) for stage in stages], 3),
        Column("parameters", [f"{stage.parameters:,}" for stage in stages]),
        Column("F", [time.show(stage.forward_seconds) for stage in stages]),
        Column("B", [time.show(stage.backward_seconds) for stage in stages]),
    ]
    if any(candidate.chosen and candidate.split_backwards for candidate in plan.candidates):
        columns += [
            Column("I", [time.show(stage.input_gradient_seconds) for stage in stages], 1),
            Column("W", [time.show(stage.weight_gradient_seconds) for stage in stages], 1),
        ]
    columns += [
        Column("sends", [size.show(_sent(stage)) for stage in stages]),
        Column("codec", [stage.codec if stage.stage < len(stages) - 1 else "" for stage in stages], 2, is_text=True),
    ]
    title = f"Stages: what one micro-batch takes ({time.name}), what they send in a step ({size.name})"
    return table(title, columns, width)


def _sent(stage: PlannedStage) -> int:
    return stage.boundary_bytes + stage.returned_bytes


def _servers(plan: RunPlan, width: int) -> Table:
    servers = plan.servers
    unit = bytes_unit(server.peak_bytes for server in servers)
    step = plan.predicted.seconds
    columns = [
        *_replica_columns(plan),
        Column("server", [str(server.position) for server in servers]),
        *([Column("shard", [str(server.shard) for server in servers])] if plan.shards > 1 else []),
        Column("name", [server.server for server in servers], 3, is_text=True),
        Column("device", [server.device for server in servers], 2, is_text=True),
        Column("stages", [" ".join(map(str, server.stages)) for server in servers]),
        Column("busy", [f"{server.busy_seconds / step:.0%}" if step else "" for server in servers]),
        Column("weights", [unit.show(server.weight_bytes) for server in servers]),
        Column("gradients", [unit.show(server.gradient_bytes) for server in servers], 1),
        Column("optimizer", [unit.show(server.optimizer_bytes) for server in servers], 1),
        Column("activations", [unit.show(server.activation_bytes) for server in servers]),
        Column("in all", [unit.show(server.peak_bytes) for server in servers]),
        Column("of", [unit.show(server.memory_bytes) if server.memory_bytes else "?" for server in servers]),
    ]
    return table(f"Servers: what they hold at the peak ({unit.name})", columns, width)


def _replica_columns(plan: RunPlan) -> list[Column]:
    """Return what tells the servers of replicas apart, and what their exchange takes, where there are several."""
    if plan.replicas == 1:
        return []
    time = seconds_unit(server.reduce_seconds for server in plan.servers)
    return [
        Column("replica", [str(server.replica) for server in plan.servers]),
        Column(f"reduce ({time.name})", [time.show(server.reduce_seconds) for server in plan.servers]),
    ]


def _split_parameters(planned: PlannedTensor, width: int) -> Table:
    kinds = planned.kinds()
    columns = [
        Column("parameters", [name for name, _, _ in kinds], is_text=True),
        Column("split by", [split for _, split, _ in kinds], is_text=True),
        Column("how many", [str(count) for _, _, count in kinds]),
    ]
    return table(f"Split parameters: what the {planned.servers} servers of a stage share", columns, width)


def _candidates(plan: RunPlan, width: int) -> Table:
    found = plan.candidates
    time = seconds_unit(candidate.seconds for candidate in found)
    size = bytes_unit(max((*candidate.peak_bytes, 0)) for candidate in found)
    traffic = bytes_unit(candidate.traffic_bytes for candidate in found)
    fastest = min(candidate.seconds for candidate in found)
    more = [candidate.seconds / fastest - 1 if fastest else 0.0 for candidate in found]
    columns = [
        Column("", ["→" if candidate.chosen else "" for candidate in found]),
        Column("schedule", [candidate.name for candidate in found], is_text=True),
        Column("stages", [_places(candidate) for candidate in found]),
        Column(f"step ({time.name})", [time.show(candidate.seconds) for candidate in found]),
        Column("more", [f"{share:.1%}" if share >= _NOTABLE else "" for share in more], 1),
        Column("bubble", [f"{candidate.bubble:.1%}" for candidate in found]),
        Column(f"peak ({size.name})", [size.show(max((*candidate.peak_bytes, 0))) for candidate in found]),
        Column(f"traffic ({traffic.name})", [traffic.show(candidate.traffic_bytes) for candidate in found], 2),
        Column("split", [str(candidate.split_backwards or "") for candidate in found], 3),
        Column("fits", ["yes" if candidate.fits else "no" for candidate in found]),
    ]
    styles = ["bold" if candidate.chosen else "" if candidate.fits else "dim" for candidate in found]
    return table("What was considered", columns, width, styles)


def _places(candidate: Candidate) -> str:
    """Return how many stages there are; and how they go over the servers, where these have several."""
    stages, servers = len(candidate.placement), 1 + max(candidate.placement, default=0)
    if stages <= servers:
        return str(stages)
    shape = "V" if candidate.placement[servers] == servers - 1 else "looped"
    return f"{stages}, {shape}"
