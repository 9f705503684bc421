"""The model that tests of stage servers train, by hand: what coordinators make of an exported one, piece by piece.

The model is tanh(x wᵀ + a), then two layers more: stage 1 uses the same w (tied), stage 2 adds what stage 0 made
(a value with two consumers).
"""

from __future__ import annotations

import torch

from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

WIDTH = 4
TRAIN, EVALUATE, PREDICT = graph_pb2.GRAPH_KIND_TRAIN, graph_pb2.GRAPH_KIND_EVALUATE, graph_pb2.GRAPH_KIND_PREDICT
MEAN, SUM = graph_pb2.LOSS_FORM_MEAN_OVER_ROWS, graph_pb2.LOSS_FORM_SUM_AND_WEIGHT


def made_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"w": (WIDTH, WIDTH), "a": (WIDTH,), "b": (WIDTH,), "v": (WIDTH, WIDTH), "scale": (WIDTH,)}
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


class Reference(torch.nn.Module):
    """The same model in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in made_state().items():
            if name == "scale":
                self.register_buffer(name, value)
            else:
                setattr(self, name, torch.nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(torch.nn.functional.linear(x, self.w, self.a))
        g = torch.tanh(torch.nn.functional.linear(h, self.w, self.b))
        return torch.nn.functional.linear(g + h, self.v) * self.scale


def _node(name: str, target: str, *values: str | int) -> graph_pb2.Node:
    arguments = [
        graph_pb2.Argument(value=value) if isinstance(value, str) else graph_pb2.Argument(integer=value)
        for value in values
    ]
    return graph_pb2.Node(name=name, target=target, arguments=arguments)


def _nodes(stage: int, graph: int, form: int) -> list[graph_pb2.Node]:
    if stage == 0:
        return [_node("u", "aten.linear.default", "x", "p_w", "p_a"), _node("h", "aten.tanh.default", "u")]
    if stage == 1:
        return [_node("t", "aten.linear.default", "h", "p_w", "p_b"), _node("g", "aten.tanh.default", "t")]
    nodes = [
        _node("s", "aten.add.Tensor", "g", "h"),
        _node("m", "aten.linear.default", "s", "p_v"),
        _node("out", "aten.mul.Tensor", "m", "p_scale"),
    ]
    if graph == PREDICT:
        return nodes
    if form == MEAN:
        return [*nodes, _node("loss", "aten.mse_loss.default", "out", "y")]
    return [
        *nodes,
        _node("loss", "aten.mse_loss.default", "out", "y", 2),  # the sum
        _node("ones", "aten.ones_like.default", "y"),
        _node("weight", "aten.sum.default", "ones"),
    ]


def segment(stage: int, graph: int, form: int) -> stage_pb2.Segment:
    uses = {0: ("w", "a"), 1: ("w", "b"), 2: ("v", "scale")}[stage]
    made = stage_pb2.Segment(
        stage=stage,
        graph=graph,
        nodes=_nodes(stage, graph, form),
        tensors=[graph_pb2.TensorUse(value=f"p_{name}", tensor=name) for name in uses],
    )
    if stage == 0:
        made.incoming.add(value="x", from_batch=True)
        made.outgoing.add(value="h", consumer_stages=[1, 2])
    elif stage == 1:
        made.incoming.add(value="h", producer_stage=0, gradient_to_stage=0, gradient_from_stage=2)
        made.outgoing.add(value="g", consumer_stages=[2])
    else:
        made.incoming.add(value="g", producer_stage=1, gradient_to_stage=1)
        made.incoming.add(value="h", producer_stage=0, gradient_to_stage=1)
        if graph == PREDICT:
            made.results.add(value="out")
        else:
            made.incoming.add(value="y", from_batch=True)
            made.loss = "loss"
            made.loss_weight = "weight" if form == SUM else ""
    return made


HOLDERS = {"w": [0, 1], "a": [0], "b": [1], "v": [2], "scale": [2]}


def placement(name: str) -> stage_pb2.TensorPlacement:
    buffer = name == "scale"
    return stage_pb2.TensorPlacement(
        spec=graph_pb2.TensorSpec(
            name=name,
            names=[name],
            kind=graph_pb2.TENSOR_KIND_BUFFER if buffer else graph_pb2.TENSOR_KIND_PARAMETER,
            persistent=buffer,
            requires_grad=not buffer,
            data_type=pb.DATA_TYPE_FLOAT64,
            shape=made_state()[name].shape,
        ),
        holder_stages=HOLDERS[name],
    )


def number(value: float) -> graph_pb2.Argument:
    return graph_pb2.Argument(real=value)


def adam(learning_rate: float) -> run_pb2.OptimizerGroup:
    return run_pb2.OptimizerGroup(
        parameters=["w", "a", "b", "v"], settings=[graph_pb2.NamedArgument(name="lr", value=number(learning_rate))]
    )
