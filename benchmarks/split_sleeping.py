"""A chain of layers that only sleep, whose backward can be in two parts: for us and for torch's pipelining alike.

A layer takes 15 ms forward, as long for the gradient of its input (I), and as long for that of its weight (W), unless
the environment says otherwise; a process has two of them, in one stage or in two. (A stage of the small GPT takes 25 to
40 ms for each.) Forward a layer sleeps in an operator of torch.library. Backward it sleeps in torch's own backward of a
convolution, the one operator that is told which of the gradients it shall make: this module puts a kernel in its place
that sleeps for each. Whoever runs a backward, in one piece or in two, and by whatever means, comes by there: a stage
server, torch's `stage_backward_input` and `stage_backward_weight`, and autograd itself. Our stage servers import this
module for it. It is for processes that have no other convolutions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch
from torch import nn

from sleeping import MICRO_BATCHES, WIDTH, exactly

LAYERS_A_PROCESS = 2
# In the environment of all processes: what a layer sleeps forward, and for each part of a backward, in seconds.
PART_SECONDS = "GRADWIRE_BENCHMARK_PART_SECONDS"
# What a layer takes besides its sleeps, "forward,part of a backward" in seconds, as in sleeping.py.
BESIDES = "GRADWIRE_BENCHMARK_PARTS_BESIDES"
_forward_besides, _part_besides = map(float, os.environ.get(BESIDES, "0,0").split(","))


def part_seconds() -> float:
    """Return what a layer sleeps forward, and for each part of a backward."""
    return float(os.environ.get(PART_SECONDS, "0.015"))


@torch.library.custom_op("gradwire_benchmark::doze", mutates_args=())
def doze(x: torch.Tensor) -> torch.Tensor:
    """Its argument, a while later; its gradient at once."""
    exactly(part_seconds() - _forward_besides)
    return x.clone()


@doze.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


doze.register_autograd(lambda _, gradient: gradient)


def _convolution_backward(
    gradient: torch.Tensor,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    """The gradients of a convolution with one channel and a kernel of one element; a while for each that is wanted."""
    if weight.numel() != 1 or wanted[2]:
        raise ValueError(f"Only a product with one number sleeps, not a convolution with {tuple(weight.shape)}")
    exactly(sum(wanted[:2]) * (part_seconds() - _part_besides))
    of_source = gradient * weight.view(()) if wanted[0] else None
    of_weight = torch.dot(gradient.flatten(), source.flatten()).view(weight.shape) if wanted[1] else None
    return of_source, of_weight, None


# As long as this lives, so do the kernels.
_kernels = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's
_kernels.impl("convolution_backward", _convolution_backward, "CPU")  # type: ignore[no-untyped-call]  # torch's


class Layer(nn.Module):
    """One layer. The first one's input needs no gradient: there the shift is what its I is for, as elsewhere."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH)) if first else None
        self.product = nn.Conv1d(1, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = doze(self.product(x if self.shift is None else x + self.shift))
        return y


def make_layers(processes: int) -> list[Layer]:
    """The whole chain; the same weights in every process."""
    torch.manual_seed(0)
    return [Layer(first=number == 0) for number in range(LAYERS_A_PROCESS * processes)]


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """One row a micro-batch, and its target."""
    return torch.ones(MICRO_BATCHES, 1, WIDTH), torch.zeros(MICRO_BATCHES, 1, WIDTH)


def besides(repeats: int = 50) -> tuple[float, float]:
    """Measure what a layer takes besides its sleeps, (forward, half of a backward) in seconds: the least of many."""
    layer, (inputs, _), seconds = Layer(first=True), make_batch(), part_seconds()
    forward, backward = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        made = layer(inputs[:1])
        between = time.perf_counter()
        made.backward(made)
        forward.append(between - began - seconds)
        backward.append(time.perf_counter() - between - 2 * seconds)
    return min(forward), min(backward) / 2


# The first call of a custom operator imports much of torch, for a second or more: not while costs are measured.
besides(repeats=1)
