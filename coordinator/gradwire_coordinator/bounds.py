"""How many messages of one value can lie untaken at their receiver during a training step, by the programs alone.

Pure. Leaves to others: making and proving the programs (`schedules.py`, `timetable.py`), and holding peers to it (the
stage servers).

A value goes from its producer to its consumers; its gradient comes back along the consumers, from the last to the
first, and from there to the producer. Only these waits are taken for granted, for a step may lack all others: what a
frozen stage makes has no gradient, and a server waits for none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from gradwire_coordinator.schedules import Programs
from gradwire_coordinator.timetable import SENDS_GRADIENTS
from gradwire_protocol.errors import PlanError
from gradwire_protocol.program import BACKWARD, FORWARD, Action
from gradwire_protocol.v1 import stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

_DIRECTIONS = {FORWARD: pb.DIRECTION_FORWARD, BACKWARD: pb.DIRECTION_BACKWARD}


class Flow(NamedTuple):
    """The messages of one value from stage to stage; kind: of the action that makes them, FORWARD or BACKWARD."""

    kind: str
    source: int
    target: int


def untaken_bounds(programs: Programs, route: Sequence[int]) -> dict[Flow, int]:
    """Return for each flow of a value how many of its messages are untaken at most, in any execution of the programs.

    One program a server; `route`: the value's producer, then its consumers, in stage order. The bound is reached: by
    the execution in which the receiver stands still while all others go on as far as they can. A server that hosts
    several consumers gets a forward value once, for the first of them; within a server there are no messages.
    """
    return _Sends(programs).bounds(route)


class _Sends:
    """What makes messages in a set of programs, by stage, for many routes."""

    def __init__(self, programs: Programs) -> None:
        # (place in its program, action)
        self._of_stage: dict[int, list[tuple[int, Action]]] = {}
        self._server_of: dict[int, int] = {}
        for server, program in enumerate(programs):
            for place, action in enumerate(program):
                sending = _sending(action)
                if sending is not None:
                    self._of_stage.setdefault(sending.stage, []).append((place, sending))
                    self._server_of[sending.stage] = server

    def bounds(self, route: Sequence[int]) -> dict[Flow, int]:
        """Return the bound of each flow of a value with this route."""
        by_server: dict[int, list[tuple[int, Action]]] = {}
        for stage in dict.fromkeys(route):
            by_server.setdefault(self._server_of[stage], []).extend(self._of_stage[stage])
        # The rest of what these servers do takes no time, and waits for nothing.
        return _bounds([[action for _, action in sorted(own)] for own in by_server.values()], route)


def _bounds(own: Programs, route: Sequence[int]) -> dict[Flow, int]:
    """Return the bounds from programs of what the route's stages send, one for each of their servers."""
    flows = _flows(route)
    needs = {(flow.target, flow.kind): (flow.source, flow.kind) for flow in flows}
    host = {action.stage: server for server, program in enumerate(own) for action in program}
    bounds = dict.fromkeys(_between_servers(flows, host), 0)
    for receiver in {host[flow.target] for flow in bounds}:
        coming = [flow for flow in bounds if host[flow.target] == receiver]
        execution = _Execution(own, needs)
        for action in own[receiver]:
            execution.run_others(receiver)
            for flow in coming:
                made = execution.done[flow.source, flow.kind]
                taken = execution.done[flow.target, flow.kind]
                bounds[flow] = max(bounds[flow], made - taken)
            execution.step(receiver, action)
    return bounds


def _between_servers(flows: Sequence[Flow], host: Mapping[int, int]) -> list[Flow]:
    first_on: set[int] = set()
    between = []
    for flow in flows:
        target = host[flow.target]
        repeated = flow.kind == FORWARD and target in first_on
        if flow.kind == FORWARD:
            first_on.add(target)
        if host[flow.source] != target and not repeated:
            between.append(flow)
    return between


def _sending(action: Action) -> Action | None:
    """Return the action as one that makes messages of a flow; None if it makes none."""
    if action.kind in SENDS_GRADIENTS:
        return action._replace(kind=BACKWARD)
    return action if action.kind == FORWARD else None


def message_bounds(
    programs: Programs,
    segments: Mapping[int, stage_pb2.Segment],
    size_of: Callable[[str], int],
    *,
    fewer: Collection[Programs] = (),
) -> dict[int, list[stage_pb2.UntakenBound]]:
    """Return the bounds of every stage that receives, for the values between the train graph's segments, by stage.

    size_of: bytes of a value, of one micro-batch. fewer: programs of steps with fewer micro-batches, for which the
    bounds must hold too. Where forwards and backwards of a stage are in no regular order they may need more.
    """
    by_stage: dict[int, list[stage_pb2.UntakenBound]] = {}
    by_route: dict[tuple[int, ...], dict[Flow, int]] = {}
    sends = [_Sends(each) for each in (programs, *fewer)]
    for stage, segment in sorted(segments.items()):
        for made in segment.outgoing:
            route = (stage, *made.consumer_stages)
            if route not in by_route:
                found = by_route[route] = sends[0].bounds(route)
                for others in sends[1:]:
                    for flow, messages in others.bounds(route).items():
                        found[flow] = max(found[flow], messages)
            for flow, messages in by_route[route].items():
                by_stage.setdefault(flow.target, []).append(
                    stage_pb2.UntakenBound(
                        direction=_DIRECTIONS[flow.kind],
                        source_stage=flow.source,
                        value=made.value,
                        messages=messages,
                        message_bytes=size_of(made.value),
                    )
                )
    return by_stage


def _flows(route: Sequence[int]) -> list[Flow]:
    producer, *consumers = route
    forward = [Flow(FORWARD, producer, consumer) for consumer in consumers]
    return forward + [Flow(BACKWARD, later, earlier) for earlier, later in zip(route, consumers, strict=False)]


class _Execution:
    """How far each server has come. Micro-batches of a stage and kind are done in order, so that counts say which."""

    def __init__(self, programs: Sequence[Sequence[Action]], needs: Mapping[tuple[int, str], tuple[int, str]]) -> None:
        self._programs = programs
        self._needs = needs
        self._position = [0] * len(programs)
        self.done = {(action.stage, action.kind): 0 for program in programs for action in program}

    def run_others(self, still: int) -> None:
        """Let all servers but one go on until each waits for something."""
        moved = True
        while moved:
            moved = False
            for server, program in enumerate(self._programs):
                while server != still and self._position[server] < len(program):
                    action = program[self._position[server]]
                    if not self._is_ready(action):
                        break
                    self._finish(server, action)
                    moved = True

    def step(self, server: int, action: Action) -> None:
        """Let a server do its next action."""
        if not self._is_ready(action):
            raise PlanError("The programs deadlock", expected="some stage that can go on", got=str(action))
        self._finish(server, action)

    def _is_ready(self, action: Action) -> bool:
        need = self._needs.get((action.stage, action.kind))
        return need is None or self.done[need] > action.micro_batch

    def _finish(self, server: int, action: Action) -> None:
        self._position[server] += 1
        self.done[action.stage, action.kind] += 1
