"""Orders actions for given costs, one decision at a time: whatever server is free takes the best of what it has ready.

A list scheduler (Graham, 1969) with the rules of Qi et al., 2024, for weight gradients. Pure and deterministic. Leaves
to others: which rules are best (`auto_schedule.py` tries many), and what the outcome takes (`simulator.py`).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradwire_coordinator.placement import hosted
from gradwire_coordinator.schedules import Programs
from gradwire_coordinator.simulator import StepCosts
from gradwire_protocol.program import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Action


@dataclass(frozen=True)
class Rules:
    """What a server does first, of what it could do.

    ahead: forwards that may be in flight beyond those that fill the pipeline. split_last: how many backwards of each
    stage, counted from the end of the step, are in two parts. waiting: weight gradients that a server keeps back before
    it does one even though there is other work. patience: how far a weight gradient may reach into the next action that
    is known to come, as a share of itself. alternate: a forward after a backward; otherwise backwards first. deep: of a
    server's stages the last one's forward first; otherwise that of the oldest micro-batch.
    """

    ahead: float
    split_last: float = 0
    waiting: float = 0
    patience: float = 1.0
    alternate: bool = True
    deep: bool = True


def list_schedule(
    costs: StepCosts, micro_batches: int, rules: Rules, limits: Sequence[float] | None = None
) -> Programs | None:
    """Return a program a server, or None if these rules come to a standstill under the limits.

    limits: bytes of activations that each server may hold.
    """
    return _Scheduler(costs, micro_batches, rules, limits).run()


class _Candidate(NamedTuple):
    there: float  # when its input is
    action: Action


class _Server:
    def __init__(self, stages: list[int], cap: float, limit: float) -> None:
        self.stages = stages
        self.cap = cap
        self.limit = limit
        self.program: list[Action] = []
        self.clock = 0.0
        self.live = 0
        self.held_bytes = 0.0
        self.waiting: deque[Action] = deque()  # weight gradients, the oldest first


class _Scheduler:
    def __init__(self, costs: StepCosts, micro_batches: int, rules: Rules, limits: Sequence[float] | None) -> None:
        self._costs = costs
        self._seconds = [stage.of for stage in costs.stages]
        self._count = micro_batches
        self._rules = rules
        self._last = len(costs.placement) - 1
        # Of a micro-batch until B or I, as much as it may need until W; and until W.
        self._bytes = [
            (max(held.activations, held.for_weights if rules.split_last else 0), held.for_weights)
            for held in costs.held
        ]
        stages_of = hosted(costs.placement)
        caps = _filling(costs, stages_of)
        self._servers = [
            _Server(stages, caps[number] + rules.ahead, math.inf if limits is None else limits[number])
            for number, stages in enumerate(stages_of)
        ]
        # What a forward of a stage leaves room for: the same micro-batch on the later stages of its server.
        self._reserve = {
            stage: sum(self._bytes[later][0] for later in stages if later > stage)
            for stages in stages_of
            for stage in stages
        }
        self._next = [{FORWARD: 0, BACKWARD: 0} for _ in costs.placement]
        self._there: dict[tuple[int, str, int], float] = {}
        self._free: dict[tuple[int, int], float] = {}
        self._events = [(0.0, number) for number in range(len(self._servers))]  # when a server looks what it can do

    def run(self) -> Programs | None:
        heapq.heapify(self._events)
        while self._events:
            now, number = heapq.heappop(self._events)
            server = self._servers[number]
            if server.clock > now:
                continue  # it looks again when it is free
            action = self._choose(server, now)
            if action is not None:
                self._do(number, server, action, now)
        done = all(counts[FORWARD] == counts[BACKWARD] == self._count for counts in self._next) and not any(
            server.waiting for server in self._servers
        )
        return [server.program for server in self._servers] if done else None

    def _choose(self, server: _Server, now: float) -> Action | None:
        """Return what the server does now; None: it waits, until something comes."""
        forwards = list(self._forwards(server))
        backwards = list(self._backwards(server))
        ready_forwards = [action for there, action in forwards if there <= now]
        ready_backwards = [action for there, action in backwards if there <= now]
        weights = server.waiting[0] if server.waiting else None
        fitting = [action for action in ready_forwards if self._fits(server, action.stage)]
        if weights is not None and (
            len(server.waiting) > self._rules.waiting or (ready_forwards and not fitting and not ready_backwards)
        ):
            return weights
        forward = max(fitting, key=self._forward_rank, default=None)
        # Of several stages the one behind: its gradient has the longer way.
        backward = max(ready_backwards, default=None)
        if forward is not None and backward is not None:
            after_backward = bool(server.program) and server.program[-1].kind != FORWARD
            return forward if self._rules.alternate and after_backward else backward
        if forward is not None or backward is not None:
            return forward or backward
        coming = min((there for there, action in (*forwards, *backwards) if there > now), default=math.inf)
        if weights is None:
            return None
        seconds = self._seconds[weights.stage][WEIGHT_GRADIENT]
        return weights if now + seconds * (1 - self._rules.patience) <= coming else None

    def _forward_rank(self, action: Action) -> tuple[int, int]:
        return (action.stage, 0) if self._rules.deep else (-action.micro_batch, action.stage)

    def _forwards(self, server: _Server) -> Iterator[_Candidate]:
        """Yield the next forward of each stage whose input is on its way, or there."""
        for stage in server.stages:
            i = self._next[stage][FORWARD]
            there = 0.0 if stage == 0 else self._there.get((stage, FORWARD, i))
            if i < self._count and there is not None:
                yield _Candidate(there, Action(stage, FORWARD, i))

    def _backwards(self, server: _Server) -> Iterator[_Candidate]:
        for stage in server.stages:
            i = self._next[stage][BACKWARD]
            if i < self._next[stage][FORWARD]:
                there = 0.0 if stage == self._last else self._there.get((stage, BACKWARD, i))
                if there is not None:
                    splits = i >= self._count - self._rules.split_last
                    yield _Candidate(there, Action(stage, INPUT_GRADIENT if splits else BACKWARD, i))

    def _fits(self, server: _Server, stage: int) -> bool:
        # A micro-batch that has come this far may go on: it was let in.
        within = server.live < server.cap or stage != server.stages[0]
        return within and server.held_bytes + self._bytes[stage][0] + self._reserve[stage] <= server.limit

    def _do(self, number: int, server: _Server, action: Action, now: float) -> None:
        stage, kind, i = action
        end = now + self._seconds[stage][kind]
        server.clock = end
        server.program.append(action)
        whole, for_weights = self._bytes[stage]
        match kind:
            case "F":
                server.live += 1
                server.held_bytes += whole
            case "B":
                server.live -= 1
                server.held_bytes -= whole
            case "I":
                server.live -= 1
                server.held_bytes -= whole - for_weights
                server.waiting.append(action._replace(kind=WEIGHT_GRADIENT))
            case _:
                server.waiting.popleft()
                server.held_bytes -= for_weights
        heapq.heappush(self._events, (end, number))
        if kind == WEIGHT_GRADIENT:
            return
        direction = FORWARD if kind == FORWARD else BACKWARD
        self._next[stage][direction] += 1
        self._send(number, stage, direction, i, end)

    def _send(self, number: int, stage: int, direction: str, i: int, end: float) -> None:
        target = stage + 1 if direction == FORWARD else stage - 1
        if not 0 <= target <= self._last:
            return
        link, other = self._costs.link(stage, target), self._costs.placement[target]
        if link is not None:
            busy = link.forward if direction == FORWARD else link.backward
            self._free[number, other] = max(self._free.get((number, other), 0.0), end) + busy
            end = self._free[number, other] + link.delay
        self._there[target, direction, i] = end
        heapq.heappush(self._events, (max(end, self._servers[other].clock), other))


def _filling(costs: StepCosts, stages_of: Sequence[Sequence[int]]) -> list[int]:
    """Return how many forwards a server has in flight when the pipeline is full.

    For each stage, the time from a micro-batch's forward to its gradient, in steps of the slowest server.
    """
    pace = max(sum(costs.stages[stage].forward + costs.stages[stage].backward for stage in own) for own in stages_of)
    if pace <= 0:
        return [len(stages_of) * len(own) for own in stages_of]
    round_trip = 0.0
    trips = [0.0] * len(costs.placement)
    for stage in reversed(range(len(costs.placement))):
        link = costs.link(stage, stage + 1) if stage + 1 < len(costs.placement) else None
        if link is not None:
            round_trip += link.forward + link.backward + 2 * link.delay
        round_trip += costs.stages[stage].forward + costs.stages[stage].backward
        trips[stage] = round_trip
    return [max(len(own), math.ceil(sum(trips[stage] for stage in own) / pace - 1e-9)) for own in stages_of]
