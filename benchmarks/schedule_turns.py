"""The contenders of the benchmark of schedules, and their turns: ours on a cluster, torch's, and one process alone.

Leaves to others: what torch's processes do (torch_schedules.py), and what follows from the numbers (schedules.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gradwire
import torch_schedules
from gradwire_coordinator.placement import Placement
from peers import Peer
from works import GPT, Work, work_of

OURS, TORCH = "gradwire", "torch"
ONE_PROCESS = "one process, 1 thread"
# The most that the machine gives to two processes, just then.
TWO_PROCESSES = "two of them, each on its own"
# Ours by what they are called here: (schedule, stages a process).
SCHEDULES = {
    "gpipe": ("gpipe", 1),
    "1f1b": ("1f1b", 1),
    "interleaved-1f1b": ("interleaved-1f1b", 2),
    "zb-h1": ("zb-h1", 1),
    "zb-v": ("zb-v", 2),
    "auto": ("auto", 1),
    "auto, v = 2": ("auto", 2),
}


@dataclass
class Measured:
    """What the turns of one contender gave, in seconds; `simulated` is what was expected, by `trainer.plan`."""

    # The process of each stage.
    placement: Placement = ()
    alone: list[float] = field(default_factory=list)
    following: list[float] = field(default_factory=list)
    # In a step, the average process.
    busy: list[float] = field(default_factory=list)
    simulated: list[float] = field(default_factory=list)
    simulated_bubble: list[float] = field(default_factory=list)
    # Of each turn: what was simulated, as a share of the step measured right behind it.
    agreement: list[float] = field(default_factory=list)


class Ours:
    """Every turn is a run on a cluster of its own, which measures costs anew: as fast as the machine is just then."""

    def __init__(self, work: Work, processes: int) -> None:
        self._work, self._processes = work, processes
        self._batch = work.batch()

    def turn(self, name: str, steps: int, measured: Measured) -> None:
        schedule, each = SCHEDULES[name]
        model = self._work.model()
        plan = gradwire.Plan(
            stages=self._processes,
            virtual_stages=each,
            schedule=schedule,
            microbatches=self._work.micro_batches,
            cuts=self._work.cuts(each * self._processes),
        )
        with (
            gradwire.local(stage_servers=self._processes, threads=1, operators=list(self._work.operators)) as cluster,
            cluster.trainer(
                model, self._work.optimizer(model.parameters()), loss=self._work.loss, example=self._batch, plan=plan
            ) as trainer,
        ):
            measured.placement = tuple(stage.server for stage in trainer.plan.stages)
            measured.simulated.append(trainer.plan.predicted.seconds)
            measured.simulated_bubble.append(trainer.plan.predicted.bubble)
            trainer.step(*self._batch)
            ended, alone = time.perf_counter(), []
            for _ in range(steps):
                result = trainer.step(*self._batch)
                before, ended = ended, time.perf_counter()
                alone.append(result.seconds)
                # A server's bubble is of the time since its last update: that of the step before.
                measured.busy.append((1 - result.bubble) * (ended - before))
            measured.alone += alone
            measured.agreement.append(trainer.plan.predicted.seconds / statistics.median(alone))
            # The first one does not count: servers waited for it.
            ends = [time.perf_counter() for _ in trainer.run([self._batch] * (steps + 1), progress=False)]
        measured.following += [later - earlier for earlier, later in itertools.pairwise(ends)]


class Torchs:
    """The processes of torch's pipelining."""

    def __init__(self, stack: contextlib.ExitStack, work: str, processes: int) -> None:
        self._processes = processes
        self._peer = stack.enter_context(
            Peer(f"{work}:{processes}", processes=processes, script=torch_schedules.__file__)
        )
        # The first step of a schedule finds out the shapes.
        for name in torch_schedules.SCHEDULES:
            self._ask(name, 1, torch_schedules.APART)

    def turn(self, name: str, steps: int, measured: Measured) -> None:
        measured.placement = torch_schedules.placement_of(name, self._processes)
        answers = self._ask(name, steps, torch_schedules.APART)
        began = zip(*(answer["began"] for answer in answers), strict=True)
        ended = zip(*(answer["ended"] for answer in answers), strict=True)
        measured.alone += [max(last) - min(first) for first, last in zip(began, ended, strict=True)]
        measured.busy.append(statistics.mean(answer["busy"] for answer in answers))
        # As with ours, but for the first one, which fills the pipeline. The first stage ends last.
        first, *_ = self._ask(name, steps + 1, torch_schedules.TOGETHER)
        measured.following += [later - earlier for earlier, later in itertools.pairwise(first["ended"])]

    def _ask(self, name: str, steps: int, how: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._peer.ask(f"{name} {steps} {how}")]


def alone_turn(peer: Peer, processes: int, steps: int, measured: Measured) -> None:
    """Have processes that know nothing of each other take steps of their own."""
    seconds = peer.run(steps) / steps / processes
    for measurements in (measured.alone, measured.following, measured.busy):
        measurements.append(seconds)


def measure(work: str, processes: int, rounds: int, steps: int) -> dict[str, Measured]:
    """Measure all contenders on so many processes, by name."""
    with contextlib.ExitStack() as stack:
        ours = Ours(work_of(work, processes), processes)
        torchs = Torchs(stack, work, processes)
        turns: dict[str, Callable[[int, Measured], None]] = {
            **{f"{OURS}, {name}": partial(ours.turn, name) for name in SCHEDULES},
            **{f"{TORCH}, {name}": partial(torchs.turn, name) for name in torch_schedules.SCHEDULES},
        }
        if work == GPT:
            for name, count in ((ONE_PROCESS, 1), (TWO_PROCESSES, 2)):
                peer = stack.enter_context(Peer(ONE_PROCESS, processes=count))
                turns[name] = partial(alone_turn, peer, count)
        found = {name: Measured() for name in turns}
        for number in range(rounds):
            for name in list(turns)[:: 1 if number % 2 else -1]:
                turns[name](steps, found[name])
    return found
