"""What a step costs on the stages of a cut model, for the simulator: made of costs by node, links and places.

Pure. Leaves to others: costs of nodes (`costs.py`), cutting (`segments.py`), what crosses boundaries (`boundaries.py`),
and the optimizer (`optimizer_costs.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from gradwire_coordinator.boundaries import Links, link_between
from gradwire_coordinator.costs import NodeCosts
from gradwire_coordinator.graph_index import GraphIndex, read_values, value_bytes
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.segments import Segments
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts
from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.v1 import stage_pb2


def stage_seconds(costs: Sequence[NodeCosts], cuts: Sequence[int], recomputes: Sequence[bool]) -> list[StageSeconds]:
    """Return what a micro-batch takes on each stage, without messages and transfers.

    costs: of the nodes on each stage's device. recomputes: which stages run each forward again; that counts as part of
    the backward, and of its first part.
    """
    found = []
    for own, (first, end), again in zip(costs, _ends(costs, cuts), recomputes, strict=True):
        forward, backward, input_gradient, weight_gradient = (
            float(part[first:end].sum())
            for part in (own.forward, own.backward, own.input_gradient, own.weight_gradient)
        )
        action = own.action
        forward += action.forward
        more = forward * again + action.backward
        found.append(
            StageSeconds(forward, more + backward, more + input_gradient, weight_gradient + action.weight_gradient)
        )
    return found


def with_messages(
    seconds: Sequence[StageSeconds], costs: Sequence[NodeCosts], placement: Placement
) -> list[StageSeconds]:
    """Add what it takes each stage to get messages from stages on other servers, and to send them."""
    found = []
    for stage, (own, node_costs) in enumerate(zip(seconds, costs, strict=True)):
        receive, send = node_costs.action.receive, node_costs.action.send
        before = stage > 0 and placement[stage - 1] != placement[stage]
        behind = stage + 1 < len(placement) and placement[stage + 1] != placement[stage]
        found.append(own.plus(receive * before + send * behind, receive * behind + send * before))
    return found


def stage_bytes(
    index: GraphIndex,
    segments: Mapping[int, stage_pb2.Segment],
    costs: Sequence[NodeCosts],
    cuts: Sequence[int],
    recomputes: Sequence[bool],
) -> list[StageBytes]:
    """Return what a micro-batch holds on each stage: what came in and what nodes keep; recomputing, only the former.

    For the second part of a backward: what nodes with parameters read, and the gradients of what they made.
    """
    values = index.producers.keys() | set(index.inputs)
    found = []
    for stage, (own, (first, end), again) in enumerate(zip(costs, _ends(costs, cuts), recomputes, strict=True)):
        segment, rows = segments[stage], own.rows
        tensors = {use.value for use in segment.tensors}
        kept: set[str] = set()
        gradients: set[str] = set()
        for node in segment.nodes:
            read = set(read_values(node))
            if read & tensors:
                kept |= read & values
                gradients.add(node.name)
        incoming = sum(value_bytes(index.spec(value.value), rows) for value in segment.incoming)
        whole = incoming + (0 if again else int(own.held_bytes[first:end].sum()))
        for_weights = sum(value_bytes(index.spec(name), rows) for names in (kept, gradients) for name in names)
        found.append(StageBytes(whole, for_weights))
    return found


def rebuilt_bytes(
    costs: Sequence[NodeCosts], cuts: Sequence[int], recomputes: Sequence[bool], placement: Placement
) -> list[int]:
    """Return what each server holds besides while a backward runs its forward again: all that nodes keep, once."""
    found = [0] * (1 + max(placement))
    for server, own, (first, end), again in zip(placement, costs, _ends(costs, cuts), recomputes, strict=True):
        if again:
            found[server] = max(found[server], int(own.held_bytes[first:end].sum()))
    return found


def reduce_seconds(segments: Segments, placement: Placement, links: Links) -> list[float]:
    """Return what adding up the gradients of tied parameters takes each server: there and back between their holders.

    Empty if there are none.
    """
    found = [0.0] * (1 + max(placement))
    for item in segments.placements:
        holders = list(dict.fromkeys(placement[stage] for stage in item.holder_stages))
        if len(holders) < 2 or not item.spec.requires_grad:
            continue
        size = math.prod(item.spec.shape) * ELEMENT_BYTES[item.spec.data_type]
        ways = [link_between(links, *pair) for pair in itertools.pairwise(holders)]
        seconds = sum(
            size / way.forward + size / way.backward + way.round_trip_seconds
            for way in ways
            if isinstance(way, LinkRate)
        )
        for server in holders:
            found[server] += seconds
    return found if any(found) else []


def step_costs(
    placement: Placement,
    loaded: tuple[Sequence[StageSeconds], Sequence[LinkSeconds]],
    held: Sequence[StageBytes],
    *,
    reduce: Sequence[float],
    update: Sequence[float],
    exchange: Sequence[float],
) -> StepCosts:
    """Return the costs of a step. loaded: stages with encoding and decoding, and links (`Boundaries.loaded`)."""
    stages, links = loaded
    return StepCosts(placement, tuple(stages), tuple(links), tuple(held), tuple(reduce), tuple(update), tuple(exchange))


def _ends(costs: Sequence[NodeCosts], cuts: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *cuts, len(costs[0].forward)]))
