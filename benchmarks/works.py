"""What the benchmark of schedules trains: the GPT of the pipeline benchmark, and a chain of layers that only sleep.

The same for us, who take the whole model, and for torch's pipelining, which takes stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

import peers
import sleeping
import split_sleeping
from gradwire.job.gpt import next_byte_loss

Batch = tuple[torch.Tensor, torch.Tensor]
GPT, SLEEPING = "gpt", "sleeping"


class Work(Protocol):
    """A model, and how it is trained."""

    micro_batches: int
    # Modules that our servers import for its operators.
    operators: tuple[str, ...]

    def model(self) -> nn.Module: ...

    def stage(self, number: int, stages: int) -> nn.Module:
        """Stage number i of n, for torch's pipelining."""

    def cuts(self, stages: int) -> list[str] | None:
        """Where our stages begin; None: where the plan says."""

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor: ...

    def batch(self) -> Batch: ...

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...


class Gpt:
    micro_batches = peers.MICRO_BATCHES
    operators: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        return peers.make_model()

    def stage(self, number: int, stages: int) -> nn.Module:
        size = peers.SHAPE.layers // stages
        return peers.Part(peers.make_model(), number * size, (number + 1) * size)

    def cuts(self, stages: int) -> None:
        return None

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return next_byte_loss(output, target)

    def batch(self) -> Batch:
        return peers.make_batch()

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=peers.LEARNING_RATE)


class Sleeping:
    micro_batches = sleeping.MICRO_BATCHES
    operators: tuple[str, ...] = (split_sleeping.__file__,)

    def __init__(self, processes: int) -> None:
        self._processes = processes

    def model(self) -> nn.Module:
        return nn.Sequential(*split_sleeping.make_layers(self._processes))

    def stage(self, number: int, stages: int) -> nn.Module:
        layers = split_sleeping.make_layers(self._processes)
        size = len(layers) // stages
        return nn.Sequential(*layers[number * size : (number + 1) * size])

    def cuts(self, stages: int) -> list[str]:
        size = split_sleeping.LAYERS_A_PROCESS * self._processes // stages
        return [str(stage * size) for stage in range(1, stages)]

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(output, target)

    def batch(self) -> Batch:
        return split_sleeping.make_batch()

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3)


def work_of(name: str, processes: int) -> Work:
    """Return what goes by that name."""
    return Gpt() if name == GPT else Sleeping(processes)
