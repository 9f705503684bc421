"""Runs of earlier coordinator processes, as the log has them: what a restarted coordinator shows of them.

Read once, at the start: nothing of them changes any more.
"""

from __future__ import annotations

from gradwire_coordinator.log import LoggedRun, RunLog
from gradwire_protocol.v1 import coordinator_pb2


def earlier_runs(log: RunLog, limit: int) -> list[coordinator_pb2.RunStatus]:
    """Return the newest runs of the log, newest first, with what is known of their ends."""
    return [_status(log, run) for run in log.runs(limit)]


def _status(log: RunLog, run: LoggedRun) -> coordinator_pb2.RunStatus:
    last_entry, finished_entry = log.last_numbers(run.run)
    status = coordinator_pb2.RunStatus(
        run=run.run,
        state=coordinator_pb2.RunState.Name(run.state),
        generation=run.generation,
        description=run.request.description[:200],
        last_entry=last_entry,
        finished_entry=finished_entry,
        reason=run.reason,
        created_at=run.created_at,
        checkpoint=log.last_checkpoint(run.run),
    )
    for entry, result in log.last_finished(run.run):
        if entry.HasField("train_step"):
            status.step, status.loss = entry.train_step.step, result.loss
            break
        if entry.HasField("load_state"):
            status.step = entry.load_state.weight_version
            break
    return status
