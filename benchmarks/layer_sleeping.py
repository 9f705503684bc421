"""Layers that sleep for as long as each is told, times three on a server that is said to be slow: for partition.py.

A layer sleeps in an operator of torch.library, for some time forward and twice that backward; our stage servers import
this module for it. Sleeping, servers do not get into each other's way, however few processors there are: what a split
into stages is worth shows as it would on devices of their own.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from sleeping import WIDTH, exactly

BACKWARD_TO_FORWARD = 2.0
# In the environment of a server: how many times as long everything takes.
SLOWNESS = "GRADWIRE_BENCHMARK_SLOWNESS"
# In the environment of both: what a layer takes besides its sleeps, "forward,backward" in seconds, as in sleeping.py.
BESIDES = "GRADWIRE_BENCHMARK_LAYER_BESIDES"
_slowness = float(os.environ.get(SLOWNESS, "1"))
_forward_besides, _backward_besides = map(float, os.environ.get(BESIDES, "0,0").split(","))


@torch.library.custom_op("gradwire_benchmark::slumber", mutates_args=())
def slumber(x: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
    """The sum of its arguments, after so many seconds. One operator is all of a layer, so that none is cut in two."""
    exactly(seconds * _slowness - _forward_besides)
    return x + weight


@slumber.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, seconds: float) -> torch.Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: torch.Tensor) -> None:
    *_, ctx.seconds = inputs


def _slumber_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Its gradients, after twice as many."""
    exactly(ctx.seconds * BACKWARD_TO_FORWARD * _slowness - _backward_besides)
    return gradient.clone(), gradient.sum(0), None


slumber.register_autograd(_slumber_backward, setup_context=_remember)


class Layer(nn.Module):
    """One layer. The weight is there for the first one to have a backward at all."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = slumber(x, self.weight, self.seconds)
        return y


def besides(repeats: int = 50) -> tuple[float, float]:
    """Measure what a layer takes besides its sleeps, (forward, backward) in seconds: the least of many, noise aside."""
    seconds = 0.001
    layer, x = Layer(seconds), torch.ones(1, WIDTH)
    forward, backward = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        made = layer(x)
        between = time.perf_counter()
        made.backward(made)
        forward.append(between - began - seconds)
        backward.append(time.perf_counter() - between - BACKWARD_TO_FORWARD * seconds)
    return min(forward), min(backward)


# The first call of a custom operator imports much of torch, for a second or more: not while costs are measured.
besides(repeats=1)
