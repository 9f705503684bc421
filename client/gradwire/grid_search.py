"""Which grid of stages × replicas × tensor for so many servers? Each is planned, and the fastest that fits is chosen.

Planning is the coordinator's; this only asks for one plan after the other, of one export of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradwire.plan import Plan
from gradwire.run_plan import RunPlan
from gradwire.units import shown_bytes, shown_seconds
from gradwire_protocol.errors import InternalError, PlanError

# Grids whose expected steps differ by less are equally good: then the one with fewer servers is chosen.
_EQUAL = 0.01


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Stages, replicas and tensor-parallel servers of each stage, and what a step on them is expected to take.

    plan: None where it cannot be carried out. reason: why not. fits: whether every server has the memory.
    """

    stages: int
    replicas: int
    tensor: int
    plan: RunPlan | None
    reason: str

    @property
    def servers(self) -> int:
        return self.stages * self.replicas * self.tensor

    @property
    def fits(self) -> bool:
        return self.plan is not None and any(item.chosen and item.fits for item in self.plan.candidates)

    @property
    def seconds(self) -> float:
        """Of a step, as expected; infinite where there is no plan that fits."""
        return self.plan.predicted.seconds if self.plan is not None and self.fits else float("inf")

    @property
    def peak_bytes(self) -> int:
        """Of the server that holds most; 0: no plan."""
        return 0 if self.plan is None else max((server.peak_bytes for server in self.plan.servers), default=0)

    @property
    def traffic_bytes(self) -> int:
        """Between servers in a step; 0: no plan."""
        return 0 if self.plan is None else next((item.traffic_bytes for item in self.plan.candidates if item.chosen), 0)

    def __str__(self) -> str:
        return f"{self.stages} × {self.replicas} × {self.tensor}"


@dataclass(frozen=True, kw_only=True)
class GridSearch:
    """All grids that were planned, the fastest first, then those that cannot be. `reason`: why the first is chosen."""

    grids: tuple[Grid, ...]
    reason: str

    @property
    def chosen(self) -> Grid:
        return self.grids[0]

    @property
    def plan(self) -> RunPlan:
        """Of the chosen grid."""
        plan = self.chosen.plan
        if plan is None:
            raise InternalError("A grid without a plan was chosen")
        return plan

    def to_record(self) -> dict[str, Any]:
        """Return all grids for JSON, the chosen one first, without what their plans have besides."""
        grids = [
            {
                "stages": grid.stages,
                "replicas": grid.replicas,
                "tensor": grid.tensor,
                "seconds": None if grid.plan is None else grid.plan.predicted.seconds,
                "bubble": None if grid.plan is None else grid.plan.predicted.bubble,
                "peak_bytes": grid.peak_bytes or None,
                "traffic_bytes": None if grid.plan is None else grid.traffic_bytes,
                "fits": grid.fits,
                "reason": grid.reason,
            }
            for grid in self.grids
        ]
        return {"grids": grids, "reason": self.reason}


def possible_grids(servers: int) -> Iterator[tuple[int, int, int]]:
    """Yield (stages, replicas, tensor) for so many servers: all that leave less than half of them idle, and one."""
    if servers > 1:
        yield 1, 1, 1
    for count in range(servers // 2 + 1, servers + 1):
        for stages in (number for number in range(1, count + 1) if count % number == 0):
            rest = count // stages
            yield from ((stages, replicas, rest // replicas) for replicas in range(1, rest + 1) if rest % replicas == 0)


def search_grids(asked: Plan, servers: int, plan: Callable[[Plan], RunPlan]) -> GridSearch:
    """Plan every grid for so many servers; PlanError if none can be carried out.

    asked: all that the grids have in common. plan: gives what becomes of one of them.
    """
    found = []
    for stages, replicas, tensor in possible_grids(servers):
        made: RunPlan | None = None
        reason = ""
        try:
            made = plan(dataclasses.replace(asked, stages=stages, replicas=replicas, tensor=tensor))
        except PlanError as error:
            reason = _in_short(error)
        grid = Grid(stages=stages, replicas=replicas, tensor=tensor, plan=made, reason=reason)
        if made is not None and not grid.fits:
            grid = Grid(stages=stages, replicas=replicas, tensor=tensor, plan=made, reason="more memory than there is")
        found.append(grid)
    found.sort(key=lambda grid: (grid.seconds, grid.servers))
    if found[0].seconds == float("inf"):
        raise PlanError(
            f"No grid of stages × replicas × tensor for {servers} servers can be carried out",
            expected="one that can",
            got="; ".join(f"{grid}: {grid.reason}" for grid in found[:4]),
            remedy="use more servers, more micro-batches, or recompute",
        )
    equal = [grid for grid in found if grid.seconds <= found[0].seconds * (1 + _EQUAL)]
    chosen = min(equal, key=lambda grid: grid.servers)
    ordered = (chosen, *(grid for grid in found if grid is not chosen))
    return GridSearch(grids=ordered, reason=_reason(ordered))


def _reason(grids: Sequence[Grid]) -> str:
    chosen = grids[0]
    text = (
        f"{chosen} (stages × replicas × tensor) is expected to take {shown_seconds(chosen.seconds)} a step, with "
        f"{shown_bytes(chosen.peak_bytes)} on the server that holds most"
    )
    others = [grid for grid in grids[1:] if grid.seconds < float("inf")]
    if not others:
        return f"{text}; no other can be carried out"
    best = others[0]
    if best.seconds <= chosen.seconds * (1 + _EQUAL):
        return f"{text}; {best} takes as long, but {best.servers} servers"
    return f"{text}; the next, {best}, takes {best.seconds / chosen.seconds - 1:.0%} longer"


def _in_short(error: PlanError) -> str:
    return error.message if not error.got else f"{error.message} ({error.got})"
