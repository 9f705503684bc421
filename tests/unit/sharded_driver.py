"""Runs an exported model as tensor-parallel servers would: rewritten, by threads that have a part each.

Threads take turns, from exchange to exchange: what draws random numbers uses the process's generator.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from graph_driver import Chain, Outcome, Shard
from shard_threads import ThreadShards, run_shards
from torch import nn

from gradwire.graph import ExportedModel
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.tensor.sharded_model import ShardedModel, shard_model
from gradwire_protocol.group_operators import GROUP_OPERATORS
from gradwire_protocol.v1 import run_pb2
from gradwire_stage.group.parts import joined, part_of_tensor
from gradwire_stage.group.tensor_group import Shards
from gradwire_stage.segment import Value


def sharded(exported: ExportedModel, shards: int, rules: Mapping[str, str] | None = None) -> ShardedModel:
    """An exported model for so many servers; without rules it is looked for what to split."""
    made = [run_pb2.TensorRule(pattern=pattern, split=split) for pattern, split in (rules or {}).items()]
    return shard_model(check_model(exported.proto), run_pb2.Plan(tensor=shards, tensor_plan=made))


def group_operators(of: ShardedModel, graph: str = "train") -> dict[str, int]:
    """How many of each there are in a graph, by short name."""
    nodes = getattr(of.indexed.model, graph).nodes
    counts = Counter(node.target.removeprefix("gradwire.group_") for node in nodes if node.target in GROUP_OPERATORS)
    return dict(counts)


@dataclass
class Turns:
    """One thread at a time; whoever waits for others lets them go on."""

    shards: ThreadShards
    turn: threading.Lock
    about: str

    @property
    def own(self) -> int:
        return self.shards.own

    @property
    def size(self) -> int:
        return self.shards.size

    def all_reduce(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._away(lambda: self.shards.all_reduce(f"{self.about}/{name}", tensor))

    def all_gather(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self._away(lambda: self.shards.all_gather(f"{self.about}/{name}", tensor))

    def _away(self, exchange: Any) -> Any:
        self.turn.release()
        try:
            return exchange()
        finally:
            self.turn.acquire()


@dataclass
class OneOfThem(Shard):
    """One of the servers."""

    threads: ThreadShards | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)

    def group(self, about: str) -> Shards | None:
        assert self.threads is not None
        return Turns(self.threads, self.turn, about)

    def check_whole(self, group: Shards | None, name: str, value: Value | None) -> None:
        if not isinstance(value, torch.Tensor):
            return
        assert group is not None
        for other in group.all_gather(name, value):
            assert torch.equal(other, value), f"{name} is not the same everywhere"


class ShardedChain:
    """All servers of a layout. Options: as of a `Chain`."""

    def __init__(self, exported: ExportedModel, of: ShardedModel, cuts: Sequence[int] = (), **options: Any) -> None:
        self.exported, self.of, self._cuts, self._options = exported, of, cuts, options
        self.exchanges: set[str] = set()

    def train(self, batch: Any, micro_batches: int = 1) -> Outcome:
        """One step, with whole gradients; what servers have the whole of is the same at all of them, bit for bit."""
        found = self._run(lambda chain: chain.train(batch, micro_batches))
        assert len({each.loss for each in found}) == 1
        return Outcome(
            found[0].loss,
            {name: self._whole(name, [each.gradients[name] for each in found]) for name in found[0].gradients},
            {name: _same(torch.stack([each.buffers[name] for each in found])) for name in found[0].buffers},
        )

    def predict(self, batch: Any) -> Any:
        return self._run(lambda chain: chain.predict(batch))[0]

    def evaluate(self, batch: Any) -> float:
        return self._run(lambda chain: chain.evaluate(batch))[0]

    def _run(self, work: Any) -> list[Any]:
        turn = threading.Lock()

        def of_one(threads: ThreadShards) -> Any:
            with turn:
                one = OneOfThem(
                    self.of.indexed, self._parts(threads.own), self.of.shards, self.of.spread, threads, turn
                )
                return work(Chain(self.exported, self._cuts, shard=one, **self._options))

        found, table = run_shards(self.of.shards, of_one)
        self.exchanges |= table.names
        return found

    def _parts(self, shard: int) -> dict[str, torch.Tensor]:
        parts = {}
        for name, spec in self.of.indexed.tensors.items():
            whole = self.exported.tensors[name]
            part = part_of_tensor(spec, whole.detach(), shards=self.of.shards, shard=shard).clone()
            assert list(part.shape) == list(spec.shape), name
            parts[name] = nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part
        return parts

    def _whole(self, name: str, found: list[torch.Tensor]) -> torch.Tensor:
        spec = self.of.indexed.tensors[name]
        if spec.HasField("split"):
            return joined(found, spec.split.dimension, spec.split.sections)
        return _same(torch.stack(found), name)


def _same(found: torch.Tensor, name: str = "") -> torch.Tensor:
    assert all(torch.equal(found[0], other) for other in found), f"{name} is not the same everywhere"
    return found[0]
