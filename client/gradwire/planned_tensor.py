"""What the tensor-parallel servers of a stage share, and what they exchange: part of a plan as it will be carried out.

Values only, read from what the coordinator answers, and the same in words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from gradwire.units import shown_bytes
from gradwire_protocol.v1 import coordinator_pb2 as pb

# The first number in a name that has more than a weight behind it: a layer's.
_LAYER = re.compile(r"(?<![^.])\d+(?=\..*\.)")


@dataclass(frozen=True, kw_only=True)
class SplitParameter:
    """A parameter of which each server of a stage has a part. split: "column", "row" or "vocab", as in a plan."""

    name: str
    split: str


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """How the servers of each stage work together.

    servers: of each stage. forward_exchanges, backward_exchanges: of one micro-batch, through all stages;
    exchange_bytes: what a server sends for them.
    """

    servers: int
    parameters: tuple[SplitParameter, ...]
    forward_exchanges: int
    backward_exchanges: int
    exchange_bytes: int

    @classmethod
    def from_proto(cls, summary: pb.TensorSummary) -> PlannedTensor:
        """Return what a coordinator's answer says."""
        return cls(
            servers=summary.servers,
            parameters=tuple(SplitParameter(name=item.name, split=item.split) for item in summary.parameters),
            forward_exchanges=summary.forward_exchanges,
            backward_exchanges=summary.backward_exchanges,
            exchange_bytes=summary.exchange_bytes,
        )

    def kinds(self) -> list[tuple[str, str, int]]:
        """Return (name, split, how many) of parameters that differ in their layers' numbers only, which are "*"."""
        counts = Counter((_LAYER.sub("*", item.name, count=1), item.split) for item in self.parameters)
        return [(name, split, count) for (name, split), count in counts.items()]


def tensor_lines(planned: PlannedTensor | None) -> Iterator[str]:
    """Yield what the servers of a stage do together, where it has several."""
    if planned is None:
        return
    splits = Counter(item.split for item in planned.parameters)
    how = ", ".join(f"{count} by {split}" for split, count in splits.items()) or "none"
    yield (
        f"tensor: {planned.servers} servers a stage share parameters ({how}); in a micro-batch they exchange "
        f"{planned.forward_exchanges} times forward and {planned.backward_exchanges} times backward, "
        f"{shown_bytes(planned.exchange_bytes)} from each"
    )
