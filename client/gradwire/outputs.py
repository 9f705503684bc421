"""Predictions: the leaves of a model's output, put together from what servers gave for each micro-batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gradwire.collecting import Result
from gradwire_protocol.errors import InternalError
from gradwire_protocol.v1 import graph_pb2


def join_outputs(outputs: Iterable[graph_pb2.GraphOutput], results: Iterable[Result], parts: int) -> list[Any]:
    """Return the leaves of the model's output; micro-batches are joined along dimension 0."""
    contents = {(result.value, result.micro_batch): result.content for result in results}
    leaves: list[Any] = []
    for output in outputs:
        if not output.value:
            leaves.append(None)
            continue
        wanted = [(output.value, index) for index in range(parts if output.batched else 1)]
        missing = [key for key in wanted if key not in contents]
        if missing:
            raise InternalError("A server did not deliver an output", expected=str(missing[0]), got=str(list(contents)))
        pieces = [contents[key] for key in wanted]
        if output.batched:
            leaves.append(torch.cat([piece for piece in pieces if isinstance(piece, torch.Tensor)]))
        else:
            leaves.append(pieces[0])
    return leaves
