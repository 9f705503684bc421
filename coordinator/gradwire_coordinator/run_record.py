"""What displays, metrics and the log's readers are told of a run: its state, its last entries, and why it ended."""

from __future__ import annotations

import time

from gradwire_protocol.v1 import coordinator_pb2, run_pb2

_MOST_DESCRIPTION = 200


class RunRecord:
    """Of one run, whose lock guards it."""

    def __init__(self, run: str, description: str) -> None:
        self._status = coordinator_pb2.RunStatus(
            run=run,
            state=coordinator_pb2.RUN_STATE_PREPARED,
            description=description[:_MOST_DESCRIPTION],
            created_at=time.time(),
        )

    @property
    def state(self) -> coordinator_pb2.RunState:
        return self._status.state

    @property
    def reason(self) -> str:
        """Why the run has ended; empty before that."""
        return self._status.reason

    @property
    def created_at(self) -> float:
        """Seconds since 1970."""
        return self._status.created_at

    @property
    def saved_at(self) -> float | None:
        """Seconds since 1970: when servers had written their last checkpoint; None if they have written none."""
        return self._status.checkpoint.written_at if self._status.HasField("checkpoint") else None

    def sent(self, entry: run_pb2.Entry) -> None:
        """An entry is on its way to all servers."""
        self._status.last_entry = entry.number
        self._status.state = coordinator_pb2.RUN_STATE_ACTIVE

    def finished(self, entry: run_pb2.Entry, result: run_pb2.EntryResult) -> None:
        """All servers have reported."""
        self._status.finished_entry = result.entry
        if entry.HasField("train_step"):
            self._status.step, self._status.loss = entry.train_step.step, result.loss
        elif entry.HasField("load_state"):
            self._status.step = entry.load_state.weight_version

    def stored(self, directory: str, step: int) -> coordinator_pb2.StoredCheckpoint:
        """Servers have written a checkpoint; return what is kept of it."""
        made = coordinator_pb2.StoredCheckpoint(directory=directory, step=step, written_at=time.time())
        self._status.checkpoint.CopyFrom(made)
        return made

    def ended(self, state: coordinator_pb2.RunState, reason: str) -> None:
        """The run begins to end."""
        self._status.state, self._status.reason = state, reason

    def status(self, generation: int, plan: coordinator_pb2.PlanSummary) -> coordinator_pb2.RunStatus:
        """Return what displays show."""
        status = coordinator_pb2.RunStatus(generation=generation, plan=plan)
        status.MergeFrom(self._status)
        return status
