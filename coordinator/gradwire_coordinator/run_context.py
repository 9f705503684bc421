"""What a run needs of the service that it is part of: the log, channels, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwire_coordinator.log import RunLog
from gradwire_coordinator.registry import ServerStanding
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.v1 import run_pb2

if TYPE_CHECKING:
    from gradwire_coordinator.run import Run


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """See above. One for all runs of a service."""

    log: RunLog
    # Opens a channel to HOST:PORT.
    connect: Callable[[str], Any]
    # Where servers write checkpoints.
    checkpoints: CheckpointRoot
    # What a server was last known to do, in words.
    last_known: Callable[[str], str]
    # How a server stands: its activity, and how many seconds ago what was heard.
    standing: Callable[[str], ServerStanding | None]
    # Called with a server that does not answer any more.
    on_lost: Callable[[str], None]
    # Called with each result, on the thread of a server's reports.
    on_result: Callable[[Run, run_pb2.Entry, run_pb2.EntryResult], None]
    # Called once, when all servers have been released.
    on_finished: Callable[[Run], None]
