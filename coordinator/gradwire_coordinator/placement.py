"""Which server hosts which stage: data that goes with a schedule. Pure; leaves to others what a server does when.

Servers are numbered by their position in the pipeline: server s has stage s, and perhaps later ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from gradwire_protocol.errors import PlanError

# The server of each stage, by stage.
Placement = tuple[int, ...]


def looped(servers: int, virtual_stages: int = 1) -> Placement:
    """Return the placement that goes round: with 3 servers and 2 virtual stages each 0 1 2 0 1 2."""
    _check(servers, virtual_stages)
    return tuple(range(servers)) * virtual_stages


def v_shaped(servers: int) -> Placement:
    """Return the placement that goes there and back (Qi et al., 2024): with 3 servers 0 1 2 2 1 0."""
    _check(servers, 1)
    return (*range(servers), *reversed(range(servers)))


def hosted(placement: Sequence[int]) -> list[list[int]]:
    """Return the stages of each server, ascending; PlanError if a server has none."""
    stages: list[list[int]] = [[] for _ in range(max(placement, default=-1) + 1)]
    for stage, server in enumerate(placement):
        stages[server].append(stage)
    if not stages or not all(stages):
        raise PlanError("A server hosts no stage", expected="a stage for every server", got=str(list(placement)[:20]))
    return stages


def neighbours(placements: Iterable[Placement]) -> list[tuple[int, int]]:
    """Return the servers between which values of neighbouring stages travel, each pair once, whichever way."""
    pairs = [pair for placement in placements for pair in itertools.pairwise(placement) if pair[0] != pair[1]]
    found: dict[frozenset[int], tuple[int, int]] = {}
    for pair in pairs:
        found.setdefault(frozenset(pair), pair)
    return list(found.values())


def _check(servers: int, virtual_stages: int) -> None:
    if servers < 1 or virtual_stages < 1:
        raise PlanError(
            "A placement needs at least one server and one stage on each",
            expected="servers and virtual stages of 1 or more",
            got=f"{servers} servers, {virtual_stages} virtual stages",
        )
