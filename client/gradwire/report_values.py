"""The values that a report is made of: a prediction beside a measurement, and one server's share of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Compared:
    """What was predicted, and what was measured."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured ÷ predicted; None where nothing was predicted."""
        return self.measured / self.predicted if self.predicted > 0 else None

    @property
    def difference(self) -> float:
        """Measured − predicted."""
        return self.measured - self.predicted

    def __add__(self, other: Compared) -> Compared:
        return Compared(self.predicted + other.predicted, self.measured + other.measured)


@dataclass(frozen=True, kw_only=True)
class ServerReport:
    """Where one server's seconds of a step went, on average over the measured steps.

    position: in its pipeline. replica, shard: None where there is only one. backward: with the gradients of weights.
    transfer_seconds: encoding and decoding what travels. waits: by what was waited for. Forward, backward, update,
    transfer and waits, as measured, add up to window_seconds: from the end of one step to the end of the next.
    """

    position: int
    replica: int | None
    shard: int | None
    server: str
    stages: tuple[int, ...]
    forward: Compared
    backward: Compared
    update: Compared
    transfer_seconds: float
    waits: Mapping[str, float]
    window_seconds: float

    @property
    def compute(self) -> Compared:
        """Forward and backward together: what cuts decide."""
        return self.forward + self.backward

    @property
    def idle_seconds(self) -> float:
        return sum(self.waits.values())

    @property
    def name(self) -> str:
        """The server in a sentence: "server 1 (stage 1)", "server 1 (stage 1, shard 0) of replica 0"."""
        several = "stages" if len(self.stages) > 1 else "stage"
        shard = "" if self.shard is None else f", shard {self.shard}"
        own = f"server {self.position} ({several} {', '.join(map(str, self.stages))}{shard})"
        return own if self.replica is None else f"{own} of replica {self.replica}"
