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
from gradwire.plan import Plan
from gradwire_protocol.torch_tensors import DATA_TYPES
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, tensors_pb2


@dataclass(frozen=True)
class RunRequest:
    """A run that can be asked for. tensors: of the user's model, by the names of the exported one."""

    message: coordinator_pb2.CreateRunRequest
    exported: ExportedModel
    optimizer: OptimizerReader
    tensors: dict[str, torch.Tensor]


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
    if micro_batch_rows is not None:
        rows = micro_batch_rows * plan.microbatches
    message = coordinator_pb2.CreateRunRequest(
        model=exported.proto,
        plan=plan.to_proto(
            rows=rows,
            cut_before=exported.cut_before,
            precision=tensors_pb2.DATA_TYPE_UNSPECIFIED if data_type is None else DATA_TYPES[data_type],
        ),
        optimizer=reader.describe(),
        seed=seed,
        description=description or type(model).__name__,
    )
    return RunRequest(message, exported, reader, tensors)
