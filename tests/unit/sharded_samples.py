"""A model of feed-forward blocks as tensor-parallel servers share it, and servers for it, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from graph_text import graph, model, plan, tensor, value_spec

from gradwire_coordinator.costs import MEASURED, NodeCosts, Rates
from gradwire_coordinator.group_costs import GroupLink
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.registry import Server
from gradwire_coordinator.tensor.sharded_model import ShardedModel, shard_model
from gradwire_coordinator.tensor_groups import Unit
from gradwire_coordinator.ways import Servers
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import graph_pb2, run_pb2

WIDTH, INNER = 8, 32
_TARGETS = {
    "aten.linear": "aten.linear.default",
    "aten.relu": "aten.relu.default",
    "aten.scale": "aten.mul.Tensor",
}
LINK = GroupLink(2, 1e8, 1e-4)


def blocks_model(blocks: int) -> graph_pb2.Model:
    """x → (scale, up, relu, down) for each block → loss; a block's products go to 32 and back to 8."""

    def of(kind: str) -> graph_pb2.Graph:
        lines, value = ["input x", *(["input target int"] if kind != "predict" else [])], "x"
        for block in range(blocks):
            for short, name in (("s", "scale"), ("u", "up"), ("d", "down")):
                lines.append(f"tensor {short}w{block} = {name}{block}")
            lines += [
                f"s{block} = scale({value}, sw{block})",
                f"u{block} = linear(s{block}, uw{block})",
                f"r{block} = relu(u{block})",
                f"d{block} = linear(r{block}, dw{block})",
            ]
            value = f"d{block}"
        if kind != "predict":
            lines.append(f"loss = cross_entropy({value}, target)")
        made = graph(kind, "\n".join([*lines, f"output {value if kind == 'predict' else 'loss'}"]))
        for node in made.nodes:
            node.target = _TARGETS.get(node.target, node.target)
            node.output.CopyFrom(value_spec(INNER if node.name[0] in "ur" else WIDTH))
        for entry in made.inputs:
            entry.spec.shape[1].fixed = WIDTH
        return made

    tensors = []
    for block in range(blocks):
        for name, shape in (("scale", [WIDTH]), ("up", [INNER, WIDTH]), ("down", [WIDTH, INNER])):
            spec = tensor(f"{name}{block}")
            spec.shape[:] = shape
            tensors.append(spec)
    return model(tensors, of("train"), of("evaluate"), of("predict"))


def blocks_request(stages: int, *, blocks: int = 2, optimizer: str = "Adam", **changes: Any) -> pb.CreateRunRequest:
    """A run of these blocks with two shards."""
    made = blocks_model(blocks)
    asked = run_pb2.Optimizer(name=optimizer)
    asked.groups.add(parameters=[spec.name for spec in made.tensors])
    return pb.CreateRunRequest(model=made, plan=plan(stages, **{"tensor": 2, **changes}), optimizer=asked)


def sharded(asked: pb.CreateRunRequest) -> ShardedModel:
    return shard_model(check_model(asked.model), asked.plan)


def server(number: int, *, host: str = "127.0.0.1", **device: Any) -> Server:
    return Server(
        server=f"stage-{number}",
        role=pb.SERVER_ROLE_STAGE,
        address=f"{host}:{9000 + number}",
        metrics_address="",
        device=pb.DeviceInfo(**{"kind": "cpu", "threads": 1, **device}),
        version="test",
        heard_at=0.0,
        progressed_at=0.0,
        client_progressed_at=0.0,
    )


def units(count: int, shards: int = 2) -> list[Unit]:
    """Groups of servers 0 and 1, 2 and 3, …"""
    return [tuple(server(shards * number + shard) for shard in range(shards)) for number in range(count)]


def known(of: ShardedModel, count: int, *, slower: Sequence[float] = (), rows: int = 2) -> Servers:
    """Each node takes 1 ms forward and 1 ms for either gradient, without exchanges."""
    each = np.full(len(of.indexed.train.graph.nodes), 1e-3)
    costs = [
        NodeCosts(rows, *(each * factor for _ in range(3)), np.full(len(each), 100), MEASURED)
        for factor in slower or [1.0] * count
    ]
    return Servers(
        rates=[Rates(1e9, 1e9)] * count, memory_bytes=[0] * count, costs=costs, links={}, groups=[LINK] * count
    )
