"""Takes a run over from its generation before: what this server needs and did not hold comes from the one that did.

Every server goes through the same list of moves in the same order, and sends or takes its own. So whoever waits waits
for one that is not behind it, and no circle of waits can form.

Leaves to others: what stays here (kept_state.py), and which tensors move (the coordinator).
"""

from __future__ import annotations

from typing import Any

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.v1 import run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.kept_state import KeptState
from gradwire_stage.keys import Key
from gradwire_stage.optimizer import StateValue
from gradwire_stage.run_state import RunState
from gradwire_stage.taking import take_state, take_tensor
from gradwire_stage.timeline import Timeline


def take_over(run: RunState, timeline: Timeline[Any], entry: int, new_plan: run_pb2.NewPlan) -> None:
    """Do the moves of a NewPlan entry, if it has some, and give the optimizer its state.

    FrameError if a tensor comes from nowhere.
    """
    if new_plan.reloads:
        return  # the LoadState that follows brings everything
    kept = run.kept
    if kept is None:
        raise FrameError("There is no state to take over", expected="a generation prepared for it", got="none")
    coming = {move.tensor for move in new_plan.moves if move.to_server == run.server}
    missing = sorted(run.tensors.keys() - kept.tensors.keys() - coming)
    if missing:
        raise FrameError(
            "Tensors come from nowhere", expected="a move for each that was not here", got=", ".join(missing[:5])
        )
    states = {name: kept.states[name] for name in run.parameters if name in kept.states}
    first_stage = {server: stage for stage, server in run.places.servers}
    for move in new_plan.moves:
        run.check()
        if move.from_server == run.server:
            run.progress.doing = f"giving {move.tensor!r} away"
            _send(run, timeline, entry, move, kept)
        elif move.to_server == run.server:
            run.progress.doing = f"taking {move.tensor!r} over"
            if move.from_server not in first_stage:
                raise FrameError("A move comes from no server of the run", got=move.from_server[:64])
            key = Key(entry, 0, move.tensor, pb.DIRECTION_MOVED, first_stage[move.from_server])
            taken = _take(run, timeline, key, move)
            if taken:
                states[move.tensor] = taken
        run.progress.advance()
    run.optimizer.restore(states)
    run.kept = None


def _send(run: RunState, timeline: Timeline[Any], entry: int, move: run_pb2.Move, kept: KeptState) -> None:
    timeline.switch(phases.ENCODE)
    tensor = kept.tensors.get(move.tensor)
    state = kept.states.get(move.tensor, {})
    if tensor is None or move.to_server not in run.places.other_servers or set(move.states) != state.keys():
        raise FrameError(
            f"{move.tensor!r} cannot be moved",
            expected="a tensor that was here, with all of the optimizer's values for it, to another server",
            got=f"to {move.to_server[:64]}, with {list(move.states)[:10]}; here: {sorted(state)}",
        )
    key = Key(entry, 0, move.tensor, pb.DIRECTION_MOVED, run.first_stage)
    for name in ("", *move.states):
        value = state[name] if name else tensor
        if isinstance(value, torch.Tensor):
            value = dense(value.detach())
            if move.tensor in run.tensors:  # it stays here, too, and the next step may write to it
                value = value.clone()
        run.peers.send([move.to_server], key._replace(state=name), value)


def _take(run: RunState, timeline: Timeline[Any], key: Key, move: run_pb2.Move) -> dict[str, StateValue]:
    """Fill a tensor of the model; return the optimizer's values for it."""
    tensor = run.tensors.get(move.tensor)
    received = take_tensor(run, timeline, key)
    if tensor is None or received is None or (received.shape, received.dtype) != (tensor.shape, tensor.dtype):
        raise FrameError(
            f"What came for {move.tensor!r} does not fit it",
            expected="a tensor that is not here" if tensor is None else f"shape {list(tensor.shape)}, {tensor.dtype}",
            got="nothing" if received is None else f"shape {list(received.shape)}, {received.dtype}",
        )
    with torch.no_grad():
        tensor.copy_(received)
    del received  # the message's memory goes before the next one is taken
    return {name: take_state(run, timeline, key._replace(state=name)) for name in move.states}
