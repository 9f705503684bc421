"""A grid of tensor-parallel stage servers without a coordinator: a model that is split by hand, and its reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from stage_cluster import Connected, StageServer, Stream

from gradwire_protocol.delivery import FrameSender
from gradwire_protocol.frames import Admission, FrameAssembler
from gradwire_protocol.group_operators import COPY, GATHER, SUM
from gradwire_protocol.torch_tensors import payload_of, tensor_from, tensor_info
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

WIDTH, OUT, SHARDS = 4, 8, 2
TRAIN, PREDICT = graph_pb2.GRAPH_KIND_TRAIN, graph_pb2.GRAPH_KIND_PREDICT
# Shapes, how they are split (dimension, sections), and the stage that holds them.
SHAPES = {"w1": (WIDTH, WIDTH), "a": (WIDTH,), "w2": (WIDTH, WIDTH), "b": (WIDTH,), "g": (WIDTH,)}
SHAPES |= {"w3": (OUT, WIDTH), "w4": (OUT, WIDTH)}
SPLITS = {"w1": (0, [WIDTH]), "a": (0, [WIDTH]), "w2": (1, [WIDTH]), "w3": (0, [4, 4]), "w4": (1, [WIDTH])}
HOLDERS = {"w1": 0, "a": 0, "w2": 0, "b": 0, "g": 1, "w3": 1, "w4": 1}


def made_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in SHAPES.items()}


class Reference(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in made_state().items():
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ self.w1.T + self.a)
        z = h @ self.w2.T + self.b
        return (z * self.g) @ self.w3.T + h @ self.w4.T


def node(name: str, target: str, *arguments: str | int | list[int]) -> graph_pb2.Node:
    made = graph_pb2.Node(name=name, target=target)
    for argument in arguments:
        if isinstance(argument, str):
            made.arguments.add(value=argument)
        elif isinstance(argument, int):
            made.arguments.add(integer=argument)
        else:
            items = [graph_pb2.Argument(integer=item) for item in argument]
            made.arguments.add(list=graph_pb2.ArgumentList(items=items))
    return made


def segment(stage: int, graph: int) -> stage_pb2.Segment:
    """Return what a shard runs: h crosses as the part that it is, and z, which all shards have, in parts."""
    uses = [graph_pb2.TensorUse(value=f"p_{name}", tensor=name) for name, holder in HOLDERS.items() if holder == stage]
    made = stage_pb2.Segment(stage=stage, graph=graph, tensors=uses)
    if stage == 0:
        made.nodes.extend(
            [
                node("u", "aten.linear.default", "x", "p_w1", "p_a"),
                node("h", "aten.tanh.default", "u"),
                node("r", "aten.linear.default", "h", "p_w2"),
                node("s", SUM, "r"),
                node("z", "aten.add.Tensor", "s", "p_b"),
            ]
        )
        made.incoming.add(value="x", from_batch=True)
        made.outgoing.add(value="h", consumer_stages=[1])
        made.outgoing.add(value="z", consumer_stages=[1], spread_dimension=1)
        return made
    made.nodes.extend(
        [
            node("q", "aten.mul.Tensor", "z", "p_g"),
            node("c", COPY, "q"),
            node("p", "aten.linear.default", "c", "p_w3"),
            node("o", GATHER, "p", 1, [4, 4]),
            node("k", "aten.linear.default", "h", "p_w4"),
            node("t", SUM, "k"),
            node("out", "aten.add.Tensor", "o", "t"),
        ]
    )
    made.incoming.add(value="h", producer_stage=0, gradient_to_stage=0)
    made.incoming.add(value="z", producer_stage=0, gradient_to_stage=0, spread_dimension=1)
    if graph == PREDICT:
        made.results.add(value="out")
    else:
        made.nodes.append(node("loss", "aten.mse_loss.default", "out", "y"))
        made.incoming.add(value="y", from_batch=True)
        made.loss = "loss"
    return made


def placement(name: str) -> stage_pb2.TensorPlacement:
    shape = list(SHAPES[name])
    spec = graph_pb2.TensorSpec(name=name, names=[name], kind=graph_pb2.TENSOR_KIND_PARAMETER, requires_grad=True)
    spec.data_type = pb.DATA_TYPE_FLOAT64
    if name in SPLITS:
        dimension, sections = SPLITS[name]
        shape[dimension] //= SHARDS
        spec.split.CopyFrom(graph_pb2.TensorSplit(dimension=dimension, sections=sections))
    spec.shape.extend(shape)
    return stage_pb2.TensorPlacement(spec=spec, holder_stages=[HOLDERS[name]])


def adam(learning_rate: float) -> run_pb2.OptimizerGroup:
    setting = graph_pb2.NamedArgument(name="lr", value=graph_pb2.Argument(real=learning_rate))
    return run_pb2.OptimizerGroup(parameters=list(SHAPES), settings=[setting])


class Grid(Connected):
    """Servers by (replica, position, shard), and the client's and the coordinator's side of one run."""

    def __init__(
        self, positions: list[list[int]], replicas: int = 1, checkpoint_root: Path | None = None, **settings: Any
    ) -> None:
        self.positions = positions
        self.settings = settings
        self.replicas = range(replicas)
        places = itertools.product(self.replicas, range(len(positions)), range(SHARDS))
        self.servers = {
            place: StageServer("-".join(map(str, place)), checkpoint_root=checkpoint_root) for place in places
        }
        self.streams: dict[tuple[int, int, int], Stream] = {}
        self.senders: dict[tuple[int, int, int], FrameSender] = {}
        self.entry = 0

    def request(self, place: tuple[int, int, int]) -> stage_pb2.PrepareRequest:
        stages = self.positions[place[1]]
        return stage_pb2.PrepareRequest(
            run="r",
            generation=1,
            server=self.servers[place].name,
            segments=[segment(stage, graph) for stage in stages for graph in (TRAIN, PREDICT)],
            tensors=[placement(name) for name, holder in HOLDERS.items() if holder in stages],
            peers=[
                stage_pb2.Peer(
                    server=server.name,
                    address=server.address,
                    stages=self.positions[position],
                    replica=replica,
                    shard=shard,
                )
                for (replica, position, shard), server in self.servers.items()
            ],
            stages=2,
            optimizer=run_pb2.Optimizer(name="AdamW", groups=[adam(0.1)]),
            loss_form=graph_pb2.LOSS_FORM_MEAN_OVER_ROWS,
            seed=5,
            transport="grpc",
            **{"compression": "none", **self.settings},
        )

    def open(self) -> None:
        for place, server in self.servers.items():
            server.call("Prepare", self.request(place))
        for place, server in self.servers.items():
            self.streams[place] = Stream(server)
            self.senders[place] = FrameSender(server.channel, server.name)
        self.load({(name, ""): value for name, value in made_state().items()})

    def load(self, state: Mapping[tuple[str, str], torch.Tensor | float], weight_version: int = 0) -> None:
        """Deliver whole tensors to all who hold them."""
        items = [run_pb2.OptimizerStateName(parameter=name, state=what) for name, what in state if what]
        entry = self.next_entry(load_state=run_pb2.LoadState(optimizer_state=items, weight_version=weight_version))
        for place in self.servers:
            for (name, what), value in state.items():
                if HOLDERS[name] in self.positions[place[1]]:
                    self.send(place, entry.number, 0, name, torch.as_tensor(value), pb.DIRECTION_STATE, what)
        self.submit(entry)
        self.reports()

    def next_entry(self, **kind: Any) -> run_pb2.Entry:
        self.entry += 1
        return run_pb2.Entry(number=self.entry, generation=1, **kind)

    def submit(self, entry: run_pb2.Entry) -> None:
        for stream in self.streams.values():
            stream.submit(entry)

    def send(
        self,
        place: tuple[int, int, int],
        entry: int,
        micro_batch: int,
        value: str,
        tensor: torch.Tensor,
        direction: int,
        state: str = "",
    ) -> None:
        key = pb.MessageKey(run="r", generation=1, entry=entry, micro_batch=micro_batch, value=value)
        key.direction, key.state = direction, state
        self.senders[place].send(pb.TensorHeader(key=key, tensor=tensor_info(tensor)), payload_of(tensor))

    def send_batch(self, entry: int, x: torch.Tensor, y: torch.Tensor | None, parts: int) -> list[run_pb2.MicroBatch]:
        """Send the rows of micro-batches, which replicas take turns in, to all shards that read them."""
        first, made = 0, []
        for index, rows in enumerate(x.tensor_split(parts)):
            replica = index % len(self.replicas)
            made.append(run_pb2.MicroBatch(index=index, first_row=first, rows=len(rows), replica=replica))
            for place in self.servers:
                if place[0] == replica and 0 in self.positions[place[1]]:
                    self.send(place, entry, index, "x", rows, pb.DIRECTION_BATCH)
                if place[0] == replica and 1 in self.positions[place[1]] and y is not None:
                    self.send(place, entry, index, "y", y[first : first + len(rows)], pb.DIRECTION_BATCH)
            first += len(rows)
        return made

    def step(self, x: torch.Tensor, y: torch.Tensor, parts: int, backward: str = "B", **options: Any) -> int:
        entry = self.next_entry(train_step=run_pb2.TrainStep(step=self.entry, **options))
        step = entry.train_step
        step.hyperparameters.groups.append(adam(0.1))
        step.micro_batches.extend(self.send_batch(entry.number, x, y, parts))
        end = ["REDUCE", "NORM", "UPDATE"] + ["GATHER"] * bool(self.settings.get("shard_optimizer"))
        for (replica, position, _), stream in self.streams.items():
            own = [part.index for part in step.micro_batches if part.replica == replica]
            stages = self.positions[position]
            forward = [f"{stage}F{index}" for stage in stages for index in own]
            backwards = [f"{stage}{kind}{index}" for stage in reversed(stages) for kind in backward for index in own]
            stream.submit(entry, " ".join([*forward, *backwards, *end]))
        return entry.number

    def reports(self) -> dict[tuple[int, int, int], run_pb2.EntryReport]:
        return {place: stream.report() for place, stream in self.streams.items()}

    def collect(self, entry: int) -> Iterator[tuple[tuple[int, int, int], pb.MessageKey, torch.Tensor | float]]:
        for place, server in self.servers.items():
            call = server.channel.unary_stream(
                "/gradwire_protocol.v1.StageService/Collect",
                request_serializer=stage_pb2.CollectRequest.SerializeToString,
                response_deserializer=None,
            )
            assembler = FrameAssembler(admit=lambda *_: Admission.KEEP)
            for frame in call(stage_pb2.CollectRequest(run="r", generation=1, entry=entry), timeout=5):
                message = assembler.feed(frame)
                if message is not None:
                    header = message.header
                    yield place, header.key, tensor_from(message) if header.HasField("tensor") else header.real

    def state(self) -> dict[tuple[str, str], torch.Tensor | float]:
        entry = self.next_entry(fetch_state=run_pb2.FetchState(optimizer_state=True))
        self.submit(entry)
        self.reports()
        found = {}
        for place, key, value in self.collect(entry.number):
            # One server of all that have these stages.
            assert (place[0], place[2]) == (0, 0)
            assert (key.value, key.state) not in found
            found[key.value, key.state] = value
        return found


def batch(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, width, dtype=torch.float64, generator=generator) for width in (WIDTH, OUT))


def reference_step(
    model: Reference, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, most: float
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return loss, norm, and gradients after clipping."""
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    optimizer.step()
    return loss.item(), norm.item(), gradients


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
