"""A chain of layers that only sleep, for us and for torch's pipelining: what remains is the pipeline's own cost.

A layer sleeps in an operator of torch.library, 5 ms forward and 10 ms backward; our stage servers import this module
for it. Run as `sleeping.py PROCESSES RANK RENDEZVOUS`, this is one process of torch's pipelining over gloo: a line on
standard input is a number of steps, the answer when each ended, what all took, and the processor's time.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import threading
import time
from typing import Any

import torch
from torch import nn

FORWARD_SECONDS = 0.005
BACKWARD_SECONDS = 0.010
MICRO_BATCHES = 16
WIDTH = 1024  # 4 KiB a micro-batch: what travels is small, so that time goes into sending it, not into its bytes
# What a layer takes besides its sleep, "forward,backward" in seconds: dispatch, autograd, waking up. overhead.py
# measures it in plain torch before it starts anything, and it is taken off the sleep: a layer takes 5 and 10 ms in all.
BESIDES = "GRADWIRE_BENCHMARK_BESIDES"
_PR_SET_TIMERSLACK = 29
_SLACK_NANOSECONDS = 1000
_forward_besides, _backward_besides = map(float, os.environ.get(BESIDES, "0,0").split(","))
_prepared = threading.local()


def exactly(seconds: float) -> None:
    """Sleep as exactly as the system can: Linux lets a thread oversleep by 50 µs, 1 % of a forward, unless told."""
    if not getattr(_prepared, "done", False):
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NANOSECONDS, 0, 0, 0)
        _prepared.done = True
    time.sleep(seconds)


@torch.library.custom_op("gradwire_benchmark::nap", mutates_args=())
def nap(x: torch.Tensor) -> torch.Tensor:
    """Its argument, 5 ms later."""
    exactly(FORWARD_SECONDS - _forward_besides)
    return x.clone()


@nap.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _nap_backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, 10 ms later."""
    exactly(BACKWARD_SECONDS - _backward_besides)
    return gradient.clone()


nap.register_autograd(_nap_backward)


class Sleeper(nn.Module):
    """One stage. The weight is there for the first one to have a backward at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = nap(x + self.weight)
        return y


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """One row a micro-batch, and its target."""
    return torch.ones(MICRO_BATCHES, WIDTH), torch.zeros(MICRO_BATCHES, WIDTH)


def besides() -> tuple[float, float]:
    """Measure what a layer takes besides its sleeps, (forward, backward) in seconds: the median of many.

    Not the least: after a sleep the caches are cold, as they are in a pipeline.
    """
    layer, (inputs, _) = Sleeper(), make_batch()
    forward, backward = [], []
    for _ in range(50):
        began = time.perf_counter()
        made = layer(inputs[:1])
        between = time.perf_counter()
        made.backward(made)
        forward.append(between - began - FORWARD_SECONDS)
        backward.append(time.perf_counter() - between - BACKWARD_SECONDS)
    return statistics.median(forward), statistics.median(backward)


def ideal_seconds(stages: int) -> float:
    """The shortest that a step can take on so many stages, whatever the schedule.

    The last stage works m times 15 ms. Before it begins, the first micro-batch passes p − 1 stages forward (5 ms each);
    when it has ended, the last one passes p − 1 stages backward (10 ms each). The first stage is busy at either end, so
    that steps one behind the other, each with the weights of the one before, cannot overlap either.
    """
    return (MICRO_BATCHES + stages - 1) * (FORWARD_SECONDS + BACKWARD_SECONDS)


def torch_pipeline(stages: int, rank: int) -> Any:
    """A function that does one step on this process's stage."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    module = Sleeper()
    stage = PipelineStage(module, rank, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    inputs, targets = make_batch()
    arguments = (inputs,) if rank == 0 else ()
    target = targets if rank == stages - 1 else None

    def step() -> None:
        schedule.step(*arguments, target=target)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    import torch.distributed as dist

    stages, rank, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=stages)
    step = torch_pipeline(stages, rank)
    for line in sys.stdin:
        dist.barrier()
        cpu = time.process_time()
        times = [time.perf_counter()]
        for _ in range(int(line)):
            step()
            times.append(time.perf_counter())
        dist.barrier()
        whole = time.perf_counter() - times[0]
        print(json.dumps({"times": times, "whole": whole, "cpu": time.process_time() - cpu}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
