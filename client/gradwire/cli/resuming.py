"""Goes on with a job whose cluster was lost: waits until it is back, and trains from the last checkpoint.

A lost cluster: its coordinator was restarted, or a server died or was stopped and another takes its place.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradwire.cluster import Cluster
from gradwire_protocol.errors import (
    Aborted,
    GradwireError,
    PlanError,
    RunNotFound,
    ServerBusy,
    StageFailed,
    Stalled,
    Stopping,
    Unreachable,
)
from gradwire_protocol.v1 import coordinator_pb2

# What ends a run that another one can go on from.
LOST = (Aborted, RunNotFound, StageFailed, Stalled, Stopping, Unreachable)
# What may come of trying too early.
_TOO_EARLY = (PlanError, ServerBusy)
# As many attempts come to nothing, from one checkpoint, before the last one's error is given.
_ATTEMPTS = 3
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.5, 5.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Free servers that a job takes."""

    stage_servers: int
    parameter_servers: int

    def __str__(self) -> str:
        counts = {"stage": self.stage_servers, "parameter": self.parameter_servers}
        return " and ".join(f"{count} {kind} server{'s' * (count != 1)}" for kind, count in counts.items() if count)

    def met_by(self, status: coordinator_pb2.GetStatusReply) -> bool:
        """Whether so many are free, and not about to leave."""
        free = Counter(server.role for server in status.servers if not (server.activity.run or server.leaving))
        return (
            free[coordinator_pb2.SERVER_ROLE_STAGE] >= self.stage_servers
            and free[coordinator_pb2.SERVER_ROLE_PARAMETER] >= self.parameter_servers
        )


class Resuming:
    """Attempts at one job. `stop` ends the waiting, from any thread or signal."""

    def __init__(
        self,
        connect: Callable[[], Cluster],
        needs: Needs,
        *,
        seconds: float,
        last_step: Callable[[], int | None],
        note: Callable[[str], None],
    ) -> None:
        """connect: raises Unreachable while there is no coordinator. seconds: how long to wait for the cluster, each
        time. last_step: of the newest checkpoint, None if there is none. note: gets what the user should know."""
        self._connect = connect
        self._needs = needs
        self._seconds = seconds
        self._last_step = last_step
        self._note = note
        # Not an event: a signal's handler must not take a lock that the wait for it may hold.
        self._stopped = False

    def stop(self) -> None:
        """Wait no more."""
        self._stopped = True

    def run(self, attempt: Callable[[Cluster, bool], dict[str, Any]], *, resume: bool) -> dict[str, Any]:
        """Return what an attempt at the job returns; the second argument is whether it goes on from a checkpoint.

        An error that is not of a lost cluster is raised at once; so is any, where there is no checkpoint to go on from,
        or when so many attempts have come no further.
        """
        in_vain, reached = 0, self._last_step() if resume else None
        passing: tuple[type[GradwireError], ...] = LOST
        while True:
            try:
                with self._connect() as cluster:
                    return attempt(cluster, resume)
            except passing as error:
                step = self._last_step()
                in_vain = in_vain + 1 if step == reached else 1
                if step is None or not self._seconds or in_vain > _ATTEMPTS or self._stopped:
                    raise
                reached = step
                self._note(f"{error} Waiting for the cluster, to go on after step {step} …")
                if not wait_for_cluster(self._connect, self._needs, self._seconds, lambda: self._stopped):
                    raise
                resume, passing = True, LOST + _TOO_EARLY


def wait_for_cluster(
    connect: Callable[[], Cluster], needs: Needs, seconds: float, is_stopped: Callable[[], bool] = lambda: False
) -> bool:
    """Return whether the cluster has what a job takes, within the time. connect: raises Unreachable before that."""
    deadline = time.monotonic() + seconds
    delay = _FIRST_RETRY_SECONDS
    while time.monotonic() < deadline:
        try:
            with connect() as cluster:
                if needs.met_by(cluster.status()):
                    return True
        except Unreachable:
            pass  # not there yet
        # Jitter: clients that lost one coordinator do not come back all at once.
        again = time.monotonic() + delay * random.uniform(0.5, 1.0)
        while time.monotonic() < min(again, deadline):
            if is_stopped():
                return False
            time.sleep(_LOOK_SECONDS)
        delay = min(2 * delay, _LONGEST_RETRY_SECONDS)
    return False
