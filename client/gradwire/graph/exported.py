"""Exports a user's model as data: three graphs, the table of tensors, and what batches must look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gradwire.collector import collector_paused
from gradwire.graph.assemble import Draft, draft, graph_of, loss_leaks_into_output
from gradwire.graph.batch import Batch, BatchLayout, FlatBatch, read_example, with_rows
from gradwire.graph.capture import capture
from gradwire.graph.check import can_compare, compare_with_eager
from gradwire.graph.copying import refuse_empty_buffers
from gradwire.graph.custom_operators import custom_operators
from gradwire.graph.dynamic import Dynamic, found_right
from gradwire.graph.operations import draws_of
from gradwire.graph.precision import autocast
from gradwire.graph.randomness import Draw
from gradwire.graph.refusals import refuse_gradient_hooks, refuse_scripted_modules
from gradwire.graph.source import location_of_function
from gradwire.graph.tensors import TensorTable
from gradwire.graph.wrapper import OutputLayout
from gradwire_protocol.errors import BatchError, PlanError
from gradwire_protocol.v1 import graph_pb2 as pb


@dataclass(frozen=True)
class ExportedModel:
    """A model as data, and what the client keeps to speak of it in the user's terms."""

    proto: pb.Model
    tensors: dict[str, torch.Tensor]  # TensorSpec.name → the user's live tensor
    batch: BatchLayout
    output: OutputLayout | None  # of predict
    draws: tuple[Draw, ...] = ()  # of random numbers in training, in order

    def flatten_batch(self, batch: Batch, kind: pb.GraphKind) -> FlatBatch:
        """Check a batch and name its values. BatchError says which input does not fit, and why."""
        return self.batch.flatten(batch, kind)

    def unflatten_output(self, leaves: list[Any]) -> Any:
        """Build the model's own output from one leaf for each output of the predict graph."""
        if self.output is None or self.output.structure is None:
            raise BatchError("The model has no output but its loss", remedy="give a loss, and a model without one")
        items = zip(leaves, self.output.is_tensor, self.output.constants, strict=True)
        return pytree.tree_unflatten(
            [leaf if is_value else constant for leaf, is_value, constant in items], self.output.structure
        )

    def cut_before(self, module_path: str) -> int:
        """Return the last allowed cut of the train graph that is not behind the first node of a module."""
        paths = [node.module_path for node in self.proto.train.nodes]
        inside = [i for i, path in enumerate(paths) if path == module_path or path.startswith(f"{module_path}.")]
        if not inside:
            raise PlanError(
                f"No module '{module_path}' takes part in the model's graph",
                expected=f"one of {', '.join(dict.fromkeys(path for path in paths if path))}"[:500],
                got=module_path,
                remedy="name a module as in model.named_modules()",
            )
        allowed = [cut for cut in self.proto.train.allowed_cuts if cut <= inside[0]]
        if not allowed:
            raise PlanError(
                f"The model cannot be cut at or before module '{module_path}'",
                expected="a module behind the first allowed cut",
                got=f"a module that begins at node {inside[0]}",
                remedy="cut before a later module",
            )
        return allowed[-1]


@collector_paused()
def export_model(
    model: nn.Module,
    loss: Callable[..., Any] | nn.Module | None,
    example: Batch,
    *,
    dynamic: Dynamic | None = None,
    check: bool = True,
    precision: torch.dtype | None = None,
    micro_batch_rows: int | None = None,
) -> ExportedModel:
    """Export a model with its loss as graphs for training, evaluation and prediction.

    The example is one batch: a tuple (inputs…, target) or a dict of keyword arguments; dimension 0 of each tensor is
    the batch unless `unbatched` marks it. With loss=None the model's output is the loss, or has it as `.loss`.
    `dynamic` names further dimensions whose sizes differ from batch to batch, as in `Cluster.trainer`.
    `check` compares the graph with the model on a small batch, where the model is small and has its data. `precision`:
    trace under autocast to this type, for the types of values, and what code reads of them, to be those of the run.
    `micro_batch_rows`: export for micro-batches of so many rows only, as a model needs that makes a number of them.
    The model is not changed. Raises ModelError for what cannot be exported, or would train wrongly.
    """
    refuse_empty_buffers(model)
    refuse_gradient_hooks(model)
    refuse_scripted_modules(model)
    batch, tensors = read_example(example, loss is not None, dynamic)
    if micro_batch_rows is not None:
        batch, tensors = with_rows(batch, tensors, micro_batch_rows)
    table = TensorTable(model, loss)
    place = location_of_function(loss)
    with autocast(precision, model):
        trained = capture(model, loss, batch, tensors, training=True)
        train = draft(trained, batch.tensors, batch, table, place)
    before = trained.sizes
    if check and can_compare(model):
        trained = compare_with_eager(model, loss, batch, tensors, trained, table, precision)
    with autocast(precision, model):
        evaluated = capture(model, loss, batch, tensors, training=False, with_output=loss is not None)
        evaluate = draft(evaluated, batch.tensors, batch, table, place)
    predict: Draft | None = None
    if loss is not None:
        predict = evaluate
        if loss_leaks_into_output(evaluate):
            inputs = [leaf for leaf in batch.tensors if not leaf.is_target]
            with autocast(precision, model):
                alone = capture(model, loss, batch, tensors, training=False, with_loss=False, with_output=True)
                predict = draft(alone, inputs, batch, table, place)
    form = pb.LOSS_FORM_SUM_AND_WEIGHT if len(train.losses) == 2 else pb.LOSS_FORM_MEAN_OVER_ROWS
    weighted = (train.weighted(), evaluate.weighted())
    if weighted[0] is not None and weighted[1] is not None:
        train, evaluate = weighted[0], weighted[1]
        form = pb.LOSS_FORM_SUM_AND_WEIGHT
    proto = pb.Model(
        train=graph_of(train, pb.GRAPH_KIND_TRAIN),
        evaluate=graph_of(evaluate, pb.GRAPH_KIND_EVALUATE),
        predict=graph_of(predict, pb.GRAPH_KIND_PREDICT) if predict is not None else None,
        tensors=table.specs,
        loss_form=form,
    )
    proto.operators.extend(custom_operators((proto.train, proto.evaluate, proto.predict)))
    batch = replace(batch, sizes=(trained.sizes, found_right(evaluated.sizes, before, trained.sizes)))
    output = predict.captured.outputs if predict is not None else None
    return ExportedModel(proto, table.tensors, batch, output, draws_of(train.flat.operations))
