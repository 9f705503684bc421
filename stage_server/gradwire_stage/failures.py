"""Says which operator of the user's model failed, and where it stands, when a segment's code raises."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

import torch

from gradwire_protocol.errors import GradwireError, LimitExceeded, ModelError
from gradwire_protocol.v1 import graph_pb2 as pb

_GENERATED = "<eval_with_key>"


def located(error: Exception, nodes: Mapping[str, pb.Node], otherwise: str) -> GradwireError:
    """Turn an error of generated code into one that names operator, module and source line.

    `nodes` gives the node behind each name of the code; `otherwise` is named where none of them failed.
    """
    node = _failing_node(error, nodes)
    if node is None:
        what, where = otherwise, ""
    else:
        what = f"Operator {node.target}"
        where = f" in module '{node.module_path}'" if node.module_path else ""
        where += f" ({node.source})" if node.source else ""
    reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    if isinstance(error, torch.OutOfMemoryError):
        return LimitExceeded(
            f"{what}{where} ran out of the device's memory",
            got=reason[:500],
            remedy="use more stages, more micro-batches, or a server with more memory",
        )
    return ModelError(
        f"{what}{where} failed",
        got=reason[:1000],
        remedy="check the values of the batch (indices within the vocabulary, targets within the classes)",
    )


def _failing_node(error: Exception, nodes: Mapping[str, pb.Node]) -> pb.Node | None:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_GENERATED) and frame.line:
            name = frame.line.split("=", 1)[0].split(":", 1)[0].strip()
            return nodes.get(name)
    return None
