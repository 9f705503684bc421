"""Copies what this server owns of a run's state, for files that are written while the run goes on.

Leaves the writing to checkpoint_writer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.checkpoint_writer import Copied, CopiedTensor
from gradwire_stage.exchange.state import SharedState
from gradwire_stage.group.whole import WholeTensors
from gradwire_stage.keys import Key
from gradwire_stage.optimizer import StateValue
from gradwire_stage.run_state import RunState
from gradwire_stage.taking import take_tensor
from gradwire_stage.timeline import Timeline


def save_state(
    run: RunState,
    timeline: Timeline[Any],
    entry: run_pb2.Entry,
    on_saved: Callable[[run_pb2.SavedPart], None],
) -> None:
    """Copy what is saved and owned here, and have it written; waits for the write before, if that is not done.

    One of the replicas writes, and of its shards one; the others give it what they hold.
    """
    save = entry.save_state
    keys = {
        name: key
        for name in run.tensors
        if (key := save.keys.get(name, name)) and run.owns(name) and is_saved(run.placements[name].spec)
    }
    shared = SharedState(run, timeline, entry.number)
    if not run.places.leads:
        run.progress.doing = "giving its part of the optimizer's state"
        shared.give(keys)
        return
    whole = WholeTensors(run, timeline, entry.number, "state")
    if not run.places.answers:
        run.progress.doing = "giving its part of the state"
        for name in keys:
            run.check()
            for state, value in _values(run, name, shared):
                whole.of_state(name, state, value)
            run.progress.advance()
        return
    if run.checkpoints.writing:
        run.progress.doing = "waiting for the checkpoint before this one to be written"
        timeline.switch(phases.WAIT_EXCHANGE)
        run.checkpoints.wait_free()
    run.progress.doing = "copying the model's state"
    timeline.switch(phases.ENCODE)
    copied = Copied(entry.number, entry.generation, run.weight_version, save)
    if 0 in run.stages:
        for name in save.kept:
            received = take_tensor(run, timeline, Key(entry.number, 0, name, pb.DIRECTION_STATE, 0))
            if received is None:
                raise FrameError(f"Nothing came for {name!r}, which a checkpoint is to have", expected="a tensor")
            copied.model.append(_copy(run, name, received))
    timeline.switch(phases.ENCODE)
    for name, key in keys.items():
        run.check()
        for state, part in _values(run, name, shared):
            value = whole.of_state(name, state, part)
            if not isinstance(value, torch.Tensor):
                copied.numbers.append(_number(key, state, value))
            elif state:
                copied.optimizer.append(_copy(run, f"{key}/{state}", value))
            else:
                copied.model.append(_copy(run, key, value))
        run.progress.advance()
    run.checkpoints.start(copied, on_saved)


def _values(run: RunState, name: str, shared: SharedState) -> list[tuple[str, StateValue]]:
    """Return a tensor, under no name, and then the optimizer's values for it by name."""
    return [("", run.tensors[name]), *shared.of(name).items()]


def is_saved(spec: graph_pb2.TensorSpec) -> bool:
    """Whether a tensor is of a kind that checkpoints hold."""
    return spec.kind == graph_pb2.TENSOR_KIND_PARAMETER or (
        spec.kind == graph_pb2.TENSOR_KIND_BUFFER and spec.persistent
    )


def _copy(run: RunState, name: str, tensor: torch.Tensor) -> CopiedTensor:
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return CopiedTensor(name, copy.dtype, tuple(copy.shape), run.device.payload(copy))


def _number(parameter: str, state: str, value: bool | int | float) -> run_pb2.OptimizerNumber:
    number = run_pb2.OptimizerNumber(parameter=parameter, state=state)
    if isinstance(value, bool):
        number.boolean = value
    elif isinstance(value, int):
        number.integer = value
    else:
        number.real = value
    return number
