"""What is expected of a run's steps, as clients are told: the chosen schedule beside the others, servers and links.

Pure. Leaves to others: choosing (`candidates.py`), and the costs behind it (`ways.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from gradwire_coordinator.boundaries import ASSUMED_LINK, Links, link_between
from gradwire_coordinator.candidates import Choice, Considered
from gradwire_coordinator.placement import Placement, hosted
from gradwire_coordinator.simulator import Simulation
from gradwire_coordinator.tensor_groups import Unit
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.optimizer_state import StateBytes
from gradwire_protocol.program import action_to_proto
from gradwire_protocol.v1 import coordinator_pb2 as pb

# More do not go into a picture, and hardly into a message.
_MOST_ACTIONS = 50_000


def predict(
    choice: Choice,
    replicas: Sequence[Sequence[Unit]],
    state: Sequence[StateBytes],
    links: Links,
    micro_batches: int,
    cost_source: str,
    partition_gap: float | None,
) -> pb.Prediction:
    """Return what is expected of a step with so many micro-batches for each replica.

    replicas: the tensor groups of each by position, of which all servers are expected to do the same. state: by
    position, that of the chosen way.
    """
    simulation = choice.chosen.candidate.simulation
    costs = choice.chosen.way.costs
    copies = len(replicas) * len(replicas[0][0])
    return pb.Prediction(
        seconds=simulation.seconds,
        bubble_ratio=simulation.bubble_ratio,
        lower_bound_seconds=choice.lower_bound_seconds,
        servers=[
            pb.ServerPrediction(
                server=server.server,
                device=server.device,
                stages=stages,
                busy_seconds=simulation.busy[position],
                reduce_seconds=costs.reduce_seconds(position),
                update_seconds=costs.update[position] if costs.update else 0.0,
                weight_bytes=held.weights,
                gradient_bytes=held.gradients,
                optimizer_bytes=held.optimizer,
                activation_bytes=choice.chosen.peak_bytes[position] - held.total,
                replica=replica,
                shard=shard,
            )
            for replica, units in enumerate(replicas)
            for position, (unit, stages, held) in enumerate(zip(units, hosted(costs.placement), state, strict=True))
            for shard, server in enumerate(unit)
        ],
        links=_links(costs.placement, links),
        candidates=[
            _candidate(item, copies, micro_batches, chosen=item is choice.chosen) for item in choice.considered
        ],
        reason=choice.reason,
        cost_source=cost_source,
        partition_gap=partition_gap,
    )


def timeline(simulation: Simulation) -> list[pb.ServerTimeline]:
    """Return every action of a step with its seconds, by position; nothing if there are too many."""
    if sum(map(len, simulation.timed)) > _MOST_ACTIONS:
        return []
    return [
        pb.ServerTimeline(
            actions=[
                pb.TimedAction(action=action_to_proto(each.action), start_seconds=each.start, end_seconds=each.end)
                for each in row
            ]
        )
        for row in simulation.timed
    ]


def _links(placement: Placement, links: Links) -> list[pb.LinkPrediction]:
    made = []
    for stage, ends in enumerate(itertools.pairwise(placement)):
        found_out = link_between(links, *ends)
        if found_out is None:
            continue  # within a server
        link = ASSUMED_LINK if isinstance(found_out, GradwireError) else found_out
        made.append(
            pb.LinkPrediction(
                stage=stage,
                forward_bytes_per_second=link.forward,
                backward_bytes_per_second=link.backward,
                round_trip_seconds=link.round_trip_seconds,
                measured=link is found_out and (ends in links or ends[::-1] in links),
                reason=found_out.message if isinstance(found_out, GradwireError) else "",
            )
        )
    return made


def _candidate(item: Considered, copies: int, micro_batches: int, *, chosen: bool) -> pb.PlanCandidate:
    """copies: servers at each position, of all replicas and shards."""
    simulation = item.candidate.simulation
    return pb.PlanCandidate(
        schedule=item.schedule,
        extra_warm_up=item.extra_warm_up,
        virtual_stages=item.way.virtual_stages,
        placement=item.way.placement,
        seconds=simulation.seconds,
        bubble_ratio=simulation.bubble_ratio,
        peak_bytes=item.peak_bytes,
        traffic_bytes=copies * (item.way.traffic_bytes * micro_batches + item.way.exchange_bytes),
        fits=item.candidate.fits,
        chosen=chosen,
        split_backwards=item.candidate.split_backwards,
    )
