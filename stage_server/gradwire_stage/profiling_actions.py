"""Measures what an action takes beside its nodes: a stage that does nothing, a message taken in, and one sent on.

Between two actions of a run lies work that leaves nothing of all this in the caches, and then it takes ten times as
long as in a loop. So something else is done before each of these runs, and the median counts.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from gradwire_protocol.frames import encode_first_frame
from gradwire_protocol.local_stream import ReceivingEnd, SendingEnd, ShortFrame, connected_pair
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.device import Device
from gradwire_stage.headers import Headers, Kind
from gradwire_stage.keys import Key
from gradwire_stage.known_kinds import KnownKind
from gradwire_stage.segment import BuiltSegment
from gradwire_stage.timeline import Clock

_RUNS = 15
# More than a core's own caches hold; and a pause, in which others use what it shares with them.
_OTHER_BYTES = 8 * 2**20
_PAUSE_SECONDS = 0.002
_ELEMENTS = 1024


def empty_stage() -> stage_pb2.Segment:
    """Return a stage that hands on what it gets."""
    segment = stage_pb2.Segment(
        incoming=[stage_pb2.IncomingValue(value="i0")], outgoing=[stage_pb2.OutgoingValue(value="n0")]
    )
    segment.nodes.add(name="n0", target="aten.alias.default").arguments.add(value="i0")
    return segment


def measure_action(device: Device, clock: Clock[Any]) -> stage_pb2.ActionCost:
    """Measure on the calling thread, in a tenth of a second."""
    torch_device = device.torch_device
    stage = BuiltSegment(empty_stage(), {}, torch_device, 0)
    other = torch.zeros(_OTHER_BYTES // 4, device=torch_device)
    value = torch.ones(1, _ELEMENTS, device=torch_device, requires_grad=True)
    gradient = torch.ones_like(value)
    one, two = connected_pair()
    sending, receiving = SendingEnd(one), ReceivingEnd(two)
    headers = Headers("measured", 1)

    def pause() -> None:
        other.add_(1.0)
        time.sleep(_PAUSE_SECONDS)

    def kind_and_payload(number: int, tensor: torch.Tensor) -> tuple[Kind, memoryview]:
        made = device.payload(tensor)
        payload = made() if callable(made) else made
        if payload is None:
            raise AssertionError("a tensor with elements has a payload")
        return headers.of(Key(1, number, "n0", pb.DIRECTION_FORWARD, 0), tensor, pb.CODEC_NONE), payload

    def send(number: int, tensor: torch.Tensor) -> None:
        kind, payload = kind_and_payload(number, tensor)
        sending.try_write_short(sending.number_of(kind) or 0, 1, number, payload)

    def receive() -> torch.Tensor:
        for _, frame in receiving.read():
            return device.claim(device.receive(*known.unpack(ShortFrame.decode(frame).payload))).requires_grad_()
        raise AssertionError("what was written is there to be read")

    # The first of a kind is another matter, and does not count.
    kind, payload = kind_and_payload(0, value)
    known = KnownKind(kind.header, "")
    sending.try_write(encode_first_frame(kind.header, payload), kind)
    list(receiving.read())
    runs = []
    try:
        send(0, value)
        for number in range(1, _RUNS + 2):
            pause()
            marks = [clock.mark()]
            came = receive()
            marks.append(clock.mark())
            made = stage.forward({"i0": came}, step=0, micro_batch=0, record=True)
            marks.append(clock.mark())
            outgoing = made.outgoing["n0"]
            if isinstance(outgoing, torch.Tensor):
                send(number, outgoing)
            marks.append(clock.mark())
            pause()
            marks.append(clock.mark())
            made.backward_input({"n0": gradient}, {}, None)
            marks.append(clock.mark())
            made.backward_weight()
            marks.append(clock.mark())
            runs.append(clock.elapsed(marks))
    finally:
        sending.release()
        sending.release()
        receiving.close()
    # The first makes what later ones find made.
    received, forward, sent, _, first, second = (1e-9 * statistics.median(part) for part in zip(*runs[1:], strict=True))
    return stage_pb2.ActionCost(
        forward_seconds=forward,
        input_gradient_seconds=first,
        weight_gradient_seconds=second,
        receive_seconds=received,
        send_seconds=sent,
    )
