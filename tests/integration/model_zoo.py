"""What an entry of the model zoo is: a kind of model, with batches of any number of rows, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = tuple[Any, ...] | dict[str, Any]
# A maker of numbers that are the same for the same seed.
Generator = torch.Generator


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model that trains as one process does."""

    name: str
    make: Callable[[], nn.Module]
    # Batches of so many rows; also draws the lengths that differ from batch to batch.
    batch: Callable[[int, Generator], Batch]
    loss: Any = None
    shows: str
    # Rows of a micro-batch depend on one another, so that one process must go over the micro-batches, too.
    rows_depend: bool = False
    # The weight of a batch's loss, where the model computes parts in float32 whatever its type is. The whole batch then
    # differs from its micro-batches by float32's rounding in one process too: equality is with the same micro-batches.
    float32_weight: Callable[[Batch], int] | None = None
    dynamic: Mapping[str, Mapping[int, str]] | tuple[Mapping[int, str] | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A kind of model that is refused, with what its error says."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Any = None
    message: str  # what stands against it
    line: str  # the user's line that it names; empty where it names the module alone
    way_out: str


def tokens(rows: int, length: int, vocabulary: int, generator: Generator) -> torch.Tensor:
    """Random token ids, (rows, length)."""
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


def numbers(*shape: int, generator: Generator) -> torch.Tensor:
    """Random float64 numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def masked_labels(rows: int, length: int, vocabulary: int, generator: Generator) -> torch.Tensor:
    """Random labels of which the first rows have many that are ignored, so that micro-batches weigh differently."""
    labels = tokens(rows, length, vocabulary, generator)
    hidden = torch.rand((rows, length), generator=generator) < torch.linspace(0.8, 0.1, rows)[:, None]
    hidden[:, -1] = False
    return labels.masked_fill(hidden, -100)


def attention_mask(rows: int, length: int, generator: Generator) -> torch.Tensor:
    """Ones, and zeros behind the end of each row; every row has a token at least."""
    ends = torch.randint(1, length + 1, (rows,), generator=generator)
    return (torch.arange(length) < ends[:, None]).long()


def squared_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A mean over rows."""
    return (output - target).square().mean()
