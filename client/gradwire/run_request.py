"""What a run is asked for with: the model as data, its optimizer and its plan, as one request to the coordinator.

Leaves to others: sending it (`calls.py`), and what becomes of it (`trainer.py`, or nothing, where a plan is only asked
for).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradwire.arguments import check_trainer_arguments
from gradwire.batches import as_arguments
from gradwire.graph import ExportedModel, export_model
from gradwire.graph.dynamic import Dynamic
from gradwire.graph.precision import precision_type
from gradwire.optimizers import OptimizerReader
from gradwire.parallel_linear import module_rules
from gradwire.plan import Plan
from gradwire.tensor_plans import check_optimizer, tensor_rules
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2, tensors_pb2


@dataclass(frozen=True)
class RunRequest:
    """A run that can be asked for. tensors: of the user's model, by the names of the exported one."""

    message: coordinator_pb2.CreateRunRequest
    exported: ExportedModel
    optimizer: OptimizerReader
    tensors: dict[str, torch.Tensor]
    # Gives the message of another plan for the same model and batch; PlanError.
    plan_message: Callable[[Plan], run_pb2.Plan]

    def with_plan(self, plan: Plan) -> coordinator_pb2.CreateRunRequest:
        """Return the request for another plan, of the same export."""
        made = coordinator_pb2.CreateRunRequest()
        made.CopyFrom(self.message)
        made.plan.CopyFrom(self.plan_message(plan))
        return made


def make_request(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Callable[..., Any] | nn.Module | None,
    example: tuple[Any, ...] | Mapping[str, Any],
    plan: Plan,
    seed: int,
    max_grad_norm: float | None,
    precision: str | None,
    description: str,
    dynamic: Dynamic | None = None,
    micro_batch_rows: int | None = None,
) -> RunRequest:
    """Check a trainer's arguments, and export the model; the arguments' own typed errors. See `Cluster.trainer`."""
    check_trainer_arguments(model, plan, seed, max_grad_norm, micro_batch_rows)
    data_type = precision_type(precision, model)
    batch = as_arguments(example)
    exported = export_model(model, loss, batch, dynamic=dynamic, precision=data_type, micro_batch_rows=micro_batch_rows)
    tensors = dict(exported.tensors)
    reader = OptimizerReader(optimizer, model, tensors)
    rows = exported.flatten_batch(batch, graph_pb2.GRAPH_KIND_TRAIN).rows
    specs = exported.proto.tensors
    of_modules = module_rules(model, loss)

    def plan_message(wanted: Plan) -> run_pb2.Plan:
        rules = tensor_rules(wanted.tensor_plan, of_modules, specs, wanted.tensor)
        check_optimizer(reader.name, {name for names in reader.members for name in names}, rules, specs)
        return wanted.to_proto(
            rows=rows if micro_batch_rows is None else micro_batch_rows * wanted.microbatches,
            cut_before=exported.cut_before,
            precision=tensors_pb2.DATA_TYPE_UNSPECIFIED if data_type is None else DATA_TYPES[data_type],
            rules=rules,
        )

    message = coordinator_pb2.CreateRunRequest(
        model=exported.proto,
        plan=plan_message(plan),
        optimizer=reader.describe(),
        seed=seed,
        description=description or type(model).__name__,
    )
    return RunRequest(message, exported, reader, tensors, plan_message)


def make_plan_request(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    loss: Callable[..., Any] | nn.Module | None,
    example: tuple[Any, ...] | Mapping[str, Any],
    precision: str | None,
    dynamic: Dynamic | None,
    micro_batch_rows: int | None,
) -> RunRequest:
    """Return the request for a plan that is only asked for: seed and clipping have no part in it."""
    return make_request(
        model,
        optimizer,
        loss=loss,
        example=example,
        plan=plan,
        seed=0,
        max_grad_norm=None,
        precision=precision,
        description="",
        dynamic=dynamic,
        micro_batch_rows=micro_batch_rows,
    )
