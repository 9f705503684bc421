"""What tests of the planner share: requests for a chain of nodes, servers, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from graph_text import chain_model, plan

from gradwire_coordinator.boundaries import Links
from gradwire_coordinator.costs import MEASURED, NodeCosts, Rates
from gradwire_coordinator.link_rates import LinkBook, LinkRate
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.plan_summary import summarise
from gradwire_coordinator.planner import PlannedRun, plan_run
from gradwire_coordinator.registry import Server
from gradwire_coordinator.tensor.sharded_model import ShardedModel, shard_model
from gradwire_coordinator.tensor_groups import Unit
from gradwire_coordinator.ways import Servers
from gradwire_protocol.errors import GradwireError
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import run_pb2

NODES = 12
SECONDS = ("forward", "input_gradient", "weight_gradient")
LINK = LinkRate(forward=1e6, backward=2e6, round_trip_seconds=2e-3)
RATES = Rates(flops_per_second=1e9, bytes_per_second=1e9)


def request(stages: int, **changes: Any) -> pb.CreateRunRequest:
    optimizer = run_pb2.Optimizer(name="Adam")
    optimizer.groups.add(parameters=[f"W{i}" for i in range(NODES)])
    return pb.CreateRunRequest(
        model=chain_model(NODES), plan=plan(stages, **{"virtual_stages": 1, **changes}), optimizer=optimizer
    )


def sharded(asked: pb.CreateRunRequest) -> ShardedModel:
    return shard_model(check_model(asked.model), asked.plan)


def servers(count: int) -> list[Unit]:
    """Groups of one server each."""
    return [(server,) for server in single_servers(count)]


def single_servers(count: int) -> list[Server]:
    return [
        Server(
            server=f"stage-{position}",
            role=pb.SERVER_ROLE_STAGE,
            address=f"127.0.0.1:{9000 + position}",
            metrics_address="",
            device=pb.DeviceInfo(kind="cpu", threads=1),
            version="test",
            heard_at=0.0,
            progressed_at=0.0,
            client_progressed_at=0.0,
        )
        for position in range(count)
    ]


def known(count: int, *, memory: int = 0, links: Links | None = None, source: str = MEASURED) -> Servers:
    """Each node takes 1 ms forward and 1 ms for either gradient, and keeps 100 bytes."""
    each = np.full(NODES + 1, 1e-3)
    costs = NodeCosts(2, each, each, each, np.full(NODES + 1, 100), source)
    return Servers(rates=[RATES] * count, memory_bytes=[memory] * count, costs=[costs] * count, links=links or {})


def planned(stages: int, **changes: Any) -> tuple[PlannedRun, pb.PlanSummary]:
    asked = request(stages, **changes)
    made = plan_run(asked, sharded(asked), servers(stages), known(stages))
    return made, summarise(asked.plan, made)


class Asked(LinkBook):
    """Answers at once, and keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__(connect=lambda address: None)
        self.links: list[tuple[str, str]] = []

    def rates(self, links: Sequence[tuple[str, str]]) -> list[LinkRate | GradwireError]:
        self.links += links
        return [LINK] * len(links)
