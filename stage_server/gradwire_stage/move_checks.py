"""Checks what the wire says of a state that moves between servers. Whether it is there, takeover.py finds out."""

from __future__ import annotations

from gradwire_protocol.errors import FrameError, LimitExceeded
from gradwire_protocol.frames import MAXIMUM_STATE_BYTES, MAXIMUM_VALUE_BYTES
from gradwire_protocol.v1 import run_pb2

_MAXIMUM_MOVES = 1_000_000


def check_moves(new_plan: run_pb2.NewPlan) -> None:
    """Refuse moves that are none, and names that are too long."""
    if len(new_plan.moves) > _MAXIMUM_MOVES:
        raise LimitExceeded("Too many tensors move", expected=f"{_MAXIMUM_MOVES} at most", got=str(len(new_plan.moves)))
    seen: set[tuple[str, str]] = set()
    for move in new_plan.moves:
        item = (move.tensor, move.to_server)
        sizes = [len(name.encode()) for name in move.states]
        if (
            not 1 <= len(move.tensor.encode()) <= MAXIMUM_VALUE_BYTES
            or item in seen
            or move.from_server == move.to_server
            or len(set(move.states)) < len(sizes)
            or not all(1 <= size <= MAXIMUM_STATE_BYTES for size in sizes)
        ):
            raise FrameError(
                "A wrong move",
                expected="a tensor, once to each server that needs it, from another one, with unique names of values",
                got=str(move)[:200],
            )
        seen.add(item)
