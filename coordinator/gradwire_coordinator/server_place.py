"""Where a server stands in a run, and how errors name it: by its stages, and by shard and replica if need be.

Leaves to others: which server stands where (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradwire_protocol.activities import stage_names


@dataclass(frozen=True, kw_only=True)
class ServerPlace:
    """The stages that a server hosts, ascending; its replica out of so many, and its shard of the stages."""

    stages: Sequence[int]
    replica: int = 0
    replicas: int = 1
    shard: int = 0
    shards: int = 1
    # Its number among parameter servers; None: it is a stage server.
    parameter_server: int | None = None

    @property
    def name(self) -> str:
        """Return "stage 1", "stages 0, 4 (shard 1) of replica 2", "parameter server 0"; nothing of what is but one."""
        if self.parameter_server is not None:
            return f"parameter server {self.parameter_server}"
        return stage_names(
            self.stages, self.replica if self.replicas > 1 else None, self.shard if self.shards > 1 else None
        )

    @property
    def leads(self) -> bool:
        """Whether it delivers the state that all replicas have, of all shards."""
        return self.replica == 0 and self.shard == 0
