"""Gathers what is known of one run's servers, for `stalls.py` to judge.

Leaves to others: when to look (`service.py`), and what follows (`run.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gradwire_coordinator.registry import Server, ServerStanding
from gradwire_coordinator.server_place import ServerPlace
from gradwire_coordinator.stalls import DEFAULT_STALL_SECONDS, Standing, find_late, find_stall
from gradwire_coordinator.window import Window
from gradwire_protocol.errors import Stalled
from gradwire_protocol.v1 import run_pb2


class StallWatch:
    """The limits of one run's plan, and who they hold for. Not thread-safe: the run guards it with its window."""

    def __init__(
        self,
        run: str,
        generation: int,
        plan: run_pb2.Plan,
        servers: Sequence[Server],
        places: Sequence[ServerPlace],
        standing: Callable[[str], ServerStanding | None],
    ) -> None:
        """`servers`: by position; `places`: of each. `standing`: how the registry knows a server; None: no more."""
        self._run = run
        self._generation = generation
        self._stall_seconds = plan.stall_seconds or DEFAULT_STALL_SECONDS
        self._step_seconds = plan.step_seconds
        self._servers = list(zip(servers, places, strict=True))
        self._standing = standing
        self._client_acted_at = -math.inf

    def client_acted(self, now: float) -> None:
        """The client has given a sign of progress that no server sees."""
        self._client_acted_at = now

    def still_seconds(self, window: Window, now: float) -> float:
        """Return for how long no server and not the client have made progress with open entries; 0 if none is open."""
        oldest = window.oldest(now)
        if oldest is None:
            return 0.0
        known = filter(None, (self._standing(server.server) for server, _ in self._servers))
        still = [each.still_seconds + each.silent_seconds for each in known]
        return min(oldest[1], now - self._client_acted_at, *still)

    def find(self, window: Window, now: float) -> Stalled | None:
        """Return why the run's open entries stand still or are late; None if they are not, or if there is none."""
        oldest = window.oldest(now)
        if oldest is None:
            return None
        standings = []
        for position, (server, place) in enumerate(self._servers):
            known = self._standing(server.server)
            if known is None:
                return None  # it is lost, and the run about to fail of that
            activity, owed = known.activity, window.owed_by(position)
            is_of_run = (activity.run, activity.generation) == (self._run, self._generation)
            standings.append(
                Standing(
                    position=position,
                    place=place,
                    server=server.server,
                    address=server.address,
                    activity=activity if is_of_run else None,
                    owes=0 if owed is None else owed.number,
                    owed_seconds=window.owed_seconds(position, now),
                    silent_seconds=known.silent_seconds,
                    still_seconds=known.still_seconds,
                    client_still_seconds=known.client_still_seconds,
                )
            )
        return find_late(oldest, standings, self._step_seconds) or find_stall(
            standings, client_seconds=now - self._client_acted_at, limit_seconds=self._stall_seconds
        )
