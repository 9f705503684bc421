"""Checks of what a client sends to create a run: the model's tables, the plan's fields, the optimizer's groups.

Leaves to others: the graphs themselves (`graph_index.py`), and whether servers and cuts suffice (`layout.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_coordinator.custom_operators import read_operators
from gradwire_coordinator.graph_index import MAXIMUM_TENSORS, GraphIndex, index_graph
from gradwire_coordinator.named_schedules import check_schedule
from gradwire_coordinator.sharing import Sharing
from gradwire_coordinator.tensor_checks import check_tensor, stage_servers
from gradwire_protocol.codecs import AUTO, CODEC_NAMES
from gradwire_protocol.errors import LimitExceeded, ModelError, OptimizerError, PlanError
from gradwire_protocol.frames import ELEMENT_BYTES, MAXIMUM_DIMENSIONS, MAXIMUM_VALUE_BYTES
from gradwire_protocol.group_operators import GROUP_OPERATORS
from gradwire_protocol.operators import is_custom
from gradwire_protocol.v1 import graph_pb2, run_pb2, tensors_pb2

MAXIMUM_STAGES = 1024
MAXIMUM_LIMIT_SECONDS = 1e6
MAXIMUM_MICRO_BATCHES = 65_536
MAXIMUM_WINDOW = 16
_LOSS_OUTPUTS = {graph_pb2.LOSS_FORM_MEAN_OVER_ROWS: 1, graph_pb2.LOSS_FORM_SUM_AND_WEIGHT: 2}


@dataclass(frozen=True)
class IndexedModel:
    """A model that has passed the checks, with its graphs indexed."""

    model: graph_pb2.Model
    tensors: dict[str, graph_pb2.TensorSpec]
    train: GraphIndex
    evaluate: GraphIndex
    # None where the model's own output is the loss.
    predict: GraphIndex | None
    # Schemas of its custom operators, by target.
    operators: dict[str, str]

    @property
    def graphs(self) -> dict[graph_pb2.GraphKind, GraphIndex]:
        """The graphs that there are, by kind, train first."""
        found = {graph_pb2.GRAPH_KIND_TRAIN: self.train, graph_pb2.GRAPH_KIND_EVALUATE: self.evaluate}
        if self.predict is not None:
            found[graph_pb2.GRAPH_KIND_PREDICT] = self.predict
        return found

    @property
    def mutated(self) -> frozenset[str]:
        """Tensors that some graph changes."""
        return frozenset().union(*(index.mutated for index in self.graphs.values()))


def check_model(model: graph_pb2.Model) -> IndexedModel:
    """Check a model and index its graphs; ModelError or LimitExceeded."""
    tensors = _check_tensors(model)
    outputs = _LOSS_OUTPUTS.get(model.loss_form)
    if outputs is None:
        raise ModelError("The model does not say what its loss means", expected="a loss form", got=str(model.loss_form))
    indexed = []
    for name, kind in (
        ("train", graph_pb2.GRAPH_KIND_TRAIN),
        ("evaluate", graph_pb2.GRAPH_KIND_EVALUATE),
        ("predict", graph_pb2.GRAPH_KIND_PREDICT),
    ):
        with_loss = kind != graph_pb2.GRAPH_KIND_PREDICT
        if not model.HasField(name):
            if with_loss:
                raise ModelError(f"The model has no {name} graph", remedy="export it again with this version")
            continue
        graph: graph_pb2.Graph = getattr(model, name)
        if graph.kind != kind:
            raise ModelError(f"The {name} graph says that it is another kind", got=str(graph.kind))
        if with_loss and len(graph.outputs) != outputs:
            raise ModelError(
                f"The {name} graph has the wrong number of outputs for its loss form",
                expected=str(outputs),
                got=str(len(graph.outputs)),
            )
        indexed.append(index_graph(graph, name, tensors))
    operators = read_operators(model.operators, "The model", ModelError)
    for index in indexed:
        _check_targets(index, operators)
    return IndexedModel(
        model=model,
        tensors=tensors,
        train=indexed[0],
        evaluate=indexed[1],
        predict=indexed[2] if len(indexed) > 2 else None,
        operators=operators,
    )


def _check_targets(index: GraphIndex, operators: dict[str, str]) -> None:
    """Refuse group operators, and custom ones that are not in the model's table: no server could run them."""
    for node in index.graph.nodes:
        if node.target in GROUP_OPERATORS:
            raise ModelError(
                f"The {index.name} graph uses an operator that only the coordinator puts into graphs",
                expected="operators of the model",
                got=node.target,
                remedy="export the model with this version",
            )
        if is_custom(node.target) and node.target not in operators:
            raise ModelError(
                f"The {index.name} graph uses a custom operator that the model does not list",
                expected="each of them in Model.operators, with its schema",
                got=repr(node.target[:80]),
                remedy="export the model with this version",
            )


def _check_tensors(model: graph_pb2.Model) -> dict[str, graph_pb2.TensorSpec]:
    if len(model.tensors) > MAXIMUM_TENSORS:
        raise LimitExceeded(
            "The model has too many tensors", expected=f"at most {MAXIMUM_TENSORS}", got=str(len(model.tensors))
        )
    tensors: dict[str, graph_pb2.TensorSpec] = {}
    for spec in model.tensors:
        if not 1 <= len(spec.name.encode()) <= MAXIMUM_VALUE_BYTES or spec.name in tensors:
            raise ModelError(
                "The model's table of tensors has a name that is empty, too long, or there twice",
                expected=f"unique names of 1 to {MAXIMUM_VALUE_BYTES} bytes",
                got=repr(spec.name[:40]),
            )
        if spec.kind == graph_pb2.TENSOR_KIND_UNSPECIFIED or spec.data_type not in ELEMENT_BYTES:
            raise ModelError(f"Tensor {spec.name} has no known kind or data type")
        if len(spec.shape) > MAXIMUM_DIMENSIONS or any(size < 0 for size in spec.shape):
            raise ModelError(
                f"Tensor {spec.name} has an impossible shape",
                expected=f"at most {MAXIMUM_DIMENSIONS} sizes, none negative",
                got=str(list(spec.shape)[:40]),
            )
        if spec.HasField("split"):
            raise ModelError(
                f"Tensor {spec.name} is split already",
                expected="whole tensors: the coordinator splits them",
                got=f"a part of dimension {spec.split.dimension}",
            )
        tensors[spec.name] = spec
    return tensors


def check_plan(plan: run_pb2.Plan) -> None:
    """Check the fields of a plan that do not depend on the model or the servers; PlanError."""
    for field, least, most in (
        ("stages", 1, MAXIMUM_STAGES),
        ("replicas", 1, MAXIMUM_STAGES),
        ("tensor", 1, MAXIMUM_STAGES),
        ("micro_batches", 1, MAXIMUM_MICRO_BATCHES),
        ("window", 1, MAXIMUM_WINDOW),
        ("expected_rows", 1, 2**40),
    ):
        value = getattr(plan, field)
        if not least <= value <= most:
            raise PlanError(f"The plan's {field} is out of range", expected=f"{least} to {most}", got=str(value))
    if stage_servers(plan) > MAXIMUM_STAGES:
        several = f", each of {plan.tensor} servers" if plan.tensor > 1 else ""
        raise PlanError(
            "The plan takes too many servers",
            expected=f"at most {MAXIMUM_STAGES}",
            got=f"{stage_servers(plan)}: {plan.replicas} replicas of {plan.stages} stages{several}",
        )
    _check_replicas(plan)
    check_tensor(plan)
    check_schedule(plan.schedule, plan.virtual_stages)
    _check_codecs(plan)
    for field, shortest in (("stall_seconds", 1.0), ("step_seconds", 0.001)):
        seconds = getattr(plan, field)
        # 0 is the default. Written so that it refuses NaN, too.
        if seconds and not shortest <= seconds <= MAXIMUM_LIMIT_SECONDS:
            raise PlanError(
                f"The plan's {field} is out of range",
                expected=f"{shortest:g} to {MAXIMUM_LIMIT_SECONDS:g}",
                got=str(seconds),
            )
    if plan.precision not in (tensors_pb2.DATA_TYPE_UNSPECIFIED, tensors_pb2.DATA_TYPE_BFLOAT16):
        raise PlanError(
            "The plan's precision is not one that this version trains in",
            expected="unspecified, or BFLOAT16",
            got=str(plan.precision),
            remedy="use BFLOAT16: FLOAT16 would need a scaled loss, and one decision of all servers to skip a step",
        )


def _check_replicas(plan: run_pb2.Plan) -> None:
    if plan.replicas > plan.micro_batches:
        raise PlanError(
            "The plan has fewer micro-batches than replicas, so some would have nothing to do",
            expected=f"{plan.replicas} micro-batches at least, over all replicas",
            got=str(plan.micro_batches),
            remedy="use more micro-batches, or fewer replicas",
        )
    Sharing.of(plan, optimizer="")


def _check_codecs(plan: run_pb2.Plan) -> None:
    asked = list(plan.activation_compression)
    if any(name not in CODEC_NAMES and name != AUTO for name in asked):
        raise PlanError(
            "The plan has a codec of activations that this version does not know",
            expected=f"{', '.join(CODEC_NAMES)} or {AUTO}",
            got=", ".join(name[:40] for name in asked[:20]),
        )
    boundaries = plan.stages * plan.virtual_stages - 1
    if len(asked) > 1 and len(asked) != boundaries:
        raise PlanError(
            "The plan's codecs of activations do not fit its stages",
            expected=f"one for all boundaries, or {boundaries}, one for each",
            got=str(len(asked)),
        )


def check_optimizer(optimizer: run_pb2.Optimizer, tensors: dict[str, graph_pb2.TensorSpec]) -> None:
    """Check that each parameter group names parameters of the model, each at most once; OptimizerError.

    Whether torch has the optimizer and its settings is for the stage servers to say.
    """
    if not optimizer.name or not optimizer.groups:
        raise OptimizerError("The optimizer has no name or no parameter group", got=repr(optimizer.name))
    seen: set[str] = set()
    for group in optimizer.groups:
        for name in group.parameters:
            if name not in tensors or tensors[name].kind != graph_pb2.TENSOR_KIND_PARAMETER:
                raise OptimizerError(
                    "The optimizer updates something that is not a parameter of the model",
                    got=repr(name),
                    remedy="make the optimizer over model.parameters() of this very model",
                )
            if name in seen:
                raise OptimizerError(f"Parameter {name} is in the optimizer twice", expected="one group each")
            seen.add(name)
