"""Measures exported models in the test's own process, for tests of what comes out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from graph_models import cases

from gradwire.graph import export_model
from gradwire_protocol.v1 import graph_pb2, stage_pb2
from gradwire_stage.device import CpuDevice
from gradwire_stage.profiling import measure_costs

MEMORY_BYTES = 2**30


def request_of(
    model: graph_pb2.Model, ends: Sequence[int] | None = None, **changes: Any
) -> stage_pb2.MeasureCostsRequest:
    """What asks for a model's costs, in groups as small as they can be."""
    graph = model.train
    fields = {"rows": [4], "seconds": 60.0, **changes}
    return stage_pb2.MeasureCostsRequest(
        graph=graph,
        tensors=model.tensors,
        ends=[*graph.allowed_cuts, len(graph.nodes)] if ends is None else ends,
        **fields,
    )


def exported(kind: str) -> graph_pb2.Model:
    """One of graph_models' cases, exported anew or as before, for the caller to change."""
    made = graph_pb2.Model()
    made.CopyFrom(_export(kind))
    return made


@functools.cache
def _export(kind: str) -> graph_pb2.Model:
    torch.manual_seed(0)
    case = cases()[kind]
    return export_model(case.model, case.loss, case.batch(4)).proto


def measure(request: stage_pb2.MeasureCostsRequest, **changes: Any) -> stage_pb2.MeasureCostsReply:
    fields: dict[str, Any] = {
        "device": CpuDevice(1),
        "memory_bytes": MEMORY_BYTES,
        "operators": {},
        "cancelled": lambda: False,
        **changes,
    }
    return measure_costs(request, **fields)
