"""Takes messages out of a run's mailbox, and accounts for the time that this waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.keys import Key
from gradwire_stage.optimizer import StateValue
from gradwire_stage.peers import Incoming
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

_WAITS = {
    pb.DIRECTION_BATCH: phases.WAIT_BATCH,
    pb.DIRECTION_FORWARD: phases.WAIT_ACTIVATION,
    pb.DIRECTION_BACKWARD: phases.WAIT_GRADIENT,
    pb.DIRECTION_STATE: phases.WAIT_BATCH,
    pb.DIRECTION_TIED: phases.WAIT_EXCHANGE,
    pb.DIRECTION_NORM: phases.WAIT_EXCHANGE,
    pb.DIRECTION_WEIGHT: phases.WAIT_EXCHANGE,
    pb.DIRECTION_MOVED: phases.WAIT_EXCHANGE,
    pb.DIRECTION_REDUCE: phases.WAIT_EXCHANGE,
    pb.DIRECTION_GROUP: phases.WAIT_EXCHANGE,
    pb.DIRECTION_WEIGHTS: phases.WAIT_EXCHANGE,
}


def take(run: RunState, timeline: Timeline[Any], key: Key) -> Incoming:
    """Take a message, waiting for it if need be; the timeline is in DECODE afterwards."""
    content = run.mailbox.poll(key)
    if content is None:
        timeline.switch(_WAITS[key.direction])
        content = run.mailbox.take(key)
    timeline.switch(phases.DECODE)
    return content


def take_tensor(run: RunState, timeline: Timeline[Any], key: Key) -> torch.Tensor | None:
    """Take a message that carries a tensor, or the statement that there is none."""
    content = take(run, timeline, key)
    if isinstance(content, pb.Absent):
        return None
    if not isinstance(content, tuple):
        raise FrameError(f"A message carries a number: {key}", expected="a tensor", got=repr(content))
    return run.device.claim(content[0])


def take_state(run: RunState, timeline: Timeline[Any], key: Key) -> StateValue:
    """Take a value of the optimizer's state: a tensor, as a copy that may be written to, or a number."""
    content = take(run, timeline, key)
    if isinstance(content, pb.Absent):
        raise FrameError(f"A message carries nothing: {key}", expected="a tensor or a number", got="absent")
    return run.device.claim(content[0]).clone() if isinstance(content, tuple) else content
