"""Torch's own pipeline schedules over gloo, for the benchmark of ours: on the GPT, and on layers that only sleep.

Each process stands ready with its stages of every schedule. Run as `torch_schedules.py WORK:PROCESSES RANK
RENDEZVOUS`: a line on standard input is "SCHEDULE STEPS apart" or "SCHEDULE STEPS together", the answer when each step
began and ended here, and for how long the processor was in the stages and in the optimizer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining

from gradwire_coordinator.placement import Placement, looped, v_shaped
from works import Work, work_of

# Name: (class, stages a process).
SCHEDULES: dict[str, tuple[Any, int]] = {
    "GPipe": (pipelining.ScheduleGPipe, 1),
    "1F1B": (pipelining.Schedule1F1B, 1),
    "Interleaved1F1B": (pipelining.ScheduleInterleaved1F1B, 2),
    "InterleavedZeroBubble": (pipelining.ScheduleInterleavedZeroBubble, 2),
    "ZBVZeroBubble": (pipelining.ScheduleZBVZeroBubble, 2),
}
# One step waits for all processes before it begins; or steps follow one another.
APART, TOGETHER = "apart", "together"


class Stage(pipelining.PipelineStage):
    """A stage that counts the seconds of its forwards and backwards."""

    seconds = 0.0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().forward_one_chunk, args, kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().backward_one_chunk, args, kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(super().backward_weight_one_chunk, args, kwargs)

    def _timed(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


def placement_of(name: str, processes: int) -> Placement:
    """Where a schedule has its stages."""
    return v_shaped(processes) if name == "ZBVZeroBubble" else looped(processes, SCHEDULES[name][1])


class Runner:
    """One schedule in this process, with stages and an optimizer of its own."""

    def __init__(self, name: str, work: Work, processes: int, rank: int) -> None:
        kind, each = SCHEDULES[name]
        placement = placement_of(name, processes)
        total = len(placement)
        mine = [stage for stage, server in enumerate(placement) if server == rank]
        modules = [work.stage(stage, total) for stage in mine]
        self._stages = [
            Stage(module, stage, total, torch.device("cpu")) for stage, module in zip(mine, modules, strict=True)
        ]
        stages = self._stages if each > 1 else self._stages[0]
        self._schedule = kind(stages, work.micro_batches, loss_fn=work.loss)
        self._optimizer = work.optimizer(nn.ModuleList(modules).parameters())
        inputs, targets = work.batch()
        self._arguments = (inputs,) if 0 in mine else ()
        self._target = targets if total - 1 in mine else None
        self._optimizer_seconds = 0.0

    def step(self) -> None:
        self._schedule.step(*self._arguments, target=self._target)
        began = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._optimizer_seconds += time.perf_counter() - began

    @property
    def busy_seconds(self) -> float:
        """So far."""
        return self._optimizer_seconds + sum(stage.seconds for stage in self._stages)


def run(runner: Runner, steps: int, *, apart: bool) -> dict[str, Any]:
    """Run steps; the clock is the same for all processes of a machine."""
    dist.barrier()
    before = runner.busy_seconds
    began, ended = [], []
    for _ in range(steps):
        if apart:
            dist.barrier()
        began.append(time.perf_counter())
        runner.step()
        ended.append(time.perf_counter())
    dist.barrier()
    return {"began": began, "ended": ended, "busy": (runner.busy_seconds - before) / steps}


def main() -> None:
    what, rank, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    name, _, count = what.partition(":")
    processes = int(count)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    work = work_of(name, processes)
    runners = {schedule: Runner(schedule, work, processes, rank) for schedule in SCHEDULES}
    for line in sys.stdin:
        schedule, steps, how = line.split()
        print(json.dumps(run(runners[schedule], int(steps), apart=how == APART)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
