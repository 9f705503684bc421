"""Programs: the ordered actions of one server for one entry, and their text form.

A program prints as "0F0 0F1 0B0 0F2 0I1 0I2 0W1 0W2 UPDATE": stage, kind, micro-batch. Schedules (coordinator) make
them, executors (stage servers) run them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import run_pb2

FORWARD = "F"
# The whole of a backward, or its two parts: gradients of inputs, which others wait for, then gradients of weights.
BACKWARD = "B"
INPUT_GRADIENT = "I"
WEIGHT_GRADIENT = "W"
REDUCE = "REDUCE"
NORM = "NORM"
UPDATE = "UPDATE"
GATHER = "GATHER"
AVERAGE = "AVERAGE"

_TO_PROTO = {
    FORWARD: run_pb2.ACTION_KIND_FORWARD,
    BACKWARD: run_pb2.ACTION_KIND_BACKWARD,
    INPUT_GRADIENT: run_pb2.ACTION_KIND_INPUT_GRADIENT,
    WEIGHT_GRADIENT: run_pb2.ACTION_KIND_WEIGHT_GRADIENT,
    REDUCE: run_pb2.ACTION_KIND_REDUCE,
    NORM: run_pb2.ACTION_KIND_NORM,
    UPDATE: run_pb2.ACTION_KIND_UPDATE,
    GATHER: run_pb2.ACTION_KIND_GATHER,
    AVERAGE: run_pb2.ACTION_KIND_AVERAGE,
}
_FROM_PROTO = {number: kind for kind, number in _TO_PROTO.items()}
OF_MICRO_BATCH = frozenset({FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT})
_TEXT = re.compile(r"(?P<stage>\d+)(?P<kind>[FBIW])(?P<micro_batch>\d+)|(?P<whole>REDUCE|NORM|UPDATE|GATHER|AVERAGE)")


class Action(NamedTuple):
    """One entry of a program. Actions of the whole step (REDUCE, NORM, …) have stage and micro-batch 0."""

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}" if self.kind in OF_MICRO_BATCH else self.kind


def parse_action(text: str) -> Action:
    """Parse "2F0", "REDUCE", …: the inverse of str()."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise FrameError(
            "Not an action",
            expected='text such as "2F0", "1B3", "REDUCE", "NORM", "UPDATE", "GATHER" or "AVERAGE"',
            got=repr(text),
        )
    if match["whole"]:
        return Action(0, match["whole"], 0)
    return Action(int(match["stage"]), match["kind"], int(match["micro_batch"]))


def format_program(program: Iterable[Action]) -> str:
    return " ".join(map(str, program))


def parse_program(text: str) -> list[Action]:
    return [parse_action(word) for word in text.split()]


def action_to_proto(action: Action) -> run_pb2.Action:
    return run_pb2.Action(kind=_TO_PROTO[action.kind], stage=action.stage, micro_batch=action.micro_batch)


def action_from_proto(message: run_pb2.Action) -> Action:
    kind = _FROM_PROTO.get(message.kind)
    if kind is None:
        raise FrameError("Unknown kind of action", expected=f"one of {sorted(_FROM_PROTO)}", got=str(message.kind))
    return Action(message.stage, kind, message.micro_batch)


def program_to_proto(program: Iterable[Action]) -> run_pb2.Program:
    return run_pb2.Program(actions=map(action_to_proto, program))


def program_from_proto(message: run_pb2.Program) -> list[Action]:
    return [action_from_proto(action) for action in message.actions]
