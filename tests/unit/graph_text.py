"""Graphs written as text, for tests of what cuts and places them.

input x            a batch input; "input x int" is one of integers
tensor w = W       the model's tensor W, known as w in this graph
h = linear(x, w)   a node; its target is "aten.linear"
update h -> B      the buffer B gets the value h
mutate B           an operator writes to the tensor B in place
output h
"""

from __future__ import annotations

import re

from gradwire_protocol.v1 import graph_pb2, run_pb2, tensors_pb2

KINDS = {
    "train": graph_pb2.GRAPH_KIND_TRAIN,
    "evaluate": graph_pb2.GRAPH_KIND_EVALUATE,
    "predict": graph_pb2.GRAPH_KIND_PREDICT,
}
_NODE = re.compile(r"(\w+) = (\w+)\((.*)\)")


def value_spec(elements_per_row: int = 4, data_type: int = tensors_pb2.DATA_TYPE_FLOAT32) -> graph_pb2.ValueSpec:
    """A tensor of (rows, elements_per_row)."""
    return graph_pb2.ValueSpec(
        kind=graph_pb2.VALUE_KIND_TENSOR,
        data_type=data_type,
        shape=[graph_pb2.AffineSize(per_row=1), graph_pb2.AffineSize(fixed=elements_per_row)],
    )


def graph(kind: str, text: str, *, allowed_cuts: list[int] | None = None, flops: int = 10**6) -> graph_pb2.Graph:
    """Parse a graph; it may be cut anywhere unless `allowed_cuts` says otherwise."""
    made = graph_pb2.Graph(kind=KINDS[kind])
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if node := _NODE.fullmatch(line):
            name, target, arguments = node.groups()
            if word == "tensor":
                raise ValueError(line)
            names = [argument.strip() for argument in arguments.split(",") if argument.strip()]
            made.nodes.add(
                name=name,
                target=f"aten.{target}",
                arguments=[graph_pb2.Argument(value=argument) for argument in names],
                module_path=f"module.{name}",
                output=value_spec(),
                flops=graph_pb2.AffineSize(per_row=flops),
            )
        elif word == "input":
            value, _, integers = rest.partition(" ")
            data_type = tensors_pb2.DATA_TYPE_INT64 if integers else tensors_pb2.DATA_TYPE_FLOAT32
            made.inputs.add(value=value, label=value, spec=value_spec(data_type=data_type), batched=True)
        elif word == "tensor":
            value, tensor = rest.split(" = ")
            made.tensors.add(value=value, tensor=tensor)
        elif word == "update":
            value, tensor = rest.split(" -> ")
            made.buffer_updates.add(value=value, tensor=tensor)
        elif word == "mutate":
            made.mutated_tensors.append(rest)
        elif word == "output":
            made.outputs.add(value=rest, batched=True)
        else:
            raise ValueError(line)
    made.allowed_cuts.extend(range(1, len(made.nodes)) if allowed_cuts is None else allowed_cuts)
    return made


def tensor(name: str, kind: str = "parameter", elements: int = 16) -> graph_pb2.TensorSpec:
    return graph_pb2.TensorSpec(
        name=name,
        names=[name],
        kind={"parameter": graph_pb2.TENSOR_KIND_PARAMETER, "buffer": graph_pb2.TENSOR_KIND_BUFFER}[kind],
        persistent=kind == "buffer",
        requires_grad=kind == "parameter",
        data_type=tensors_pb2.DATA_TYPE_FLOAT32,
        shape=[elements],
    )


def model(
    tensors: list[graph_pb2.TensorSpec],
    train: graph_pb2.Graph,
    evaluate: graph_pb2.Graph | None = None,
    predict: graph_pb2.Graph | None = None,
) -> graph_pb2.Model:
    """A model whose loss is a mean, or (sum, weight) if its train graph has two outputs."""
    if evaluate is None:
        evaluate = graph_pb2.Graph()
        evaluate.CopyFrom(train)
        evaluate.kind = graph_pb2.GRAPH_KIND_EVALUATE
    forms = {1: graph_pb2.LOSS_FORM_MEAN_OVER_ROWS, 2: graph_pb2.LOSS_FORM_SUM_AND_WEIGHT}
    return graph_pb2.Model(
        tensors=tensors, train=train, evaluate=evaluate, predict=predict, loss_form=forms[len(train.outputs)]
    )


def chain(kind: str, nodes: int) -> graph_pb2.Graph:
    """x → n0 → n1 → … → loss, with a parameter W<i> at each node; "predict" ends before the loss."""
    lines = ["input x", *(["input target int"] if kind != "predict" else [])]
    lines += [f"tensor w{i} = W{i}" for i in range(nodes)]
    lines += [f"n{i} = linear({f'n{i - 1}' if i else 'x'}, w{i})" for i in range(nodes)]
    if kind != "predict":
        lines.append(f"loss = cross_entropy(n{nodes - 1}, target)")
    lines.append("output loss" if kind != "predict" else f"output n{nodes - 1}")
    return graph(kind, "\n".join(lines))


def chain_model(nodes: int) -> graph_pb2.Model:
    """A chain as a whole model, with all three graphs."""
    return model(
        [tensor(f"W{i}") for i in range(nodes)],
        chain("train", nodes),
        chain("evaluate", nodes),
        chain("predict", nodes),
    )


def plan(stages: int, **changes: object) -> run_pb2.Plan:
    fields: dict[str, object] = {
        "stages": stages,
        "virtual_stages": 1,
        "replicas": 1,
        "tensor": 1,
        "micro_batches": 4,
        "schedule": "auto",
        "window": 2,
        "expected_rows": 8,
    }
    return run_pb2.Plan(**{**fields, **changes})  # type: ignore[arg-type]
