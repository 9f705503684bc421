"""Tensor-parallel servers as threads of one process, which exchange tensors through a table."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_WAIT_SECONDS = 30.0


@dataclass
class Table:
    """What shards have put down, by name and shard, with copies that tell whether something was changed."""

    size: int
    put: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    broken: bool = False

    def swap(self, name: str, shard: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Put down what a shard has; return what all have, when it is there."""
        with self.changed:
            assert (name, shard) not in self.put, f"{name} was exchanged twice"
            self.put[name, shard] = (tensor, tensor.clone())
            self.changed.notify_all()
            wanted = [(name, other) for other in range(self.size)]
            come = self.changed.wait_for(lambda: self.broken or all(key in self.put for key in wanted), _WAIT_SECONDS)
            assert come, f"not all shards came to {name}"
            assert not self.broken, "another shard has failed"
            return [self.put[key][0] for key in wanted]

    def break_off(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def check(self) -> None:
        for key, (tensor, copy) in self.put.items():
            assert torch.equal(tensor, copy), f"{key} was written to after it had been sent"

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.put}


@dataclass
class ThreadShards:
    """One of the shards (`tensor_group.Shards`)."""

    own: int
    size: int
    table: Table

    def all_reduce(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = self.table.swap(name, self.own, tensor.detach())
        return sum(found[1:], found[0])

    def all_gather(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.table.swap(name, self.own, tensor.detach())


def run_shards(size: int, work: Callable[[ThreadShards], T]) -> tuple[list[T], Table]:
    """Return what each shard's work gives, and what they exchanged. The first failure is raised."""
    table = Table(size)

    def run(shard: int) -> T:
        try:
            return work(ThreadShards(shard, size, table))
        except BaseException:
            table.break_off()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, shard) for shard in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if "another shard has failed" not in str(error)), errors[0])
    table.check()
    return [future.result() for future in futures], table


def scope_of(group: Any, *, writes: bool = False) -> Any:
    """Return what operators see of a pass."""
    return SimpleNamespace(group=group, writes=writes)
