"""What happens when a run is to stop: its state is saved between two steps, and its loop gets an error that says where.

Who asks: the coordinator or a server that has got SIGTERM, or this process itself (`Trainer.request_stop`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gradwire_protocol.errors import GradwireError, Stopping

if TYPE_CHECKING:
    from gradwire.trainer import Trainer

OnStop = Callable[["Trainer"], None]


def stop(trainer: Trainer, reason: str, on_stop: OnStop | None) -> Stopping:
    """Save the state, and return the error for the loop. Whatever fails in saving is part of what it says."""
    step = trainer.steps_done
    message = f"Run {trainer.run_id} is to end after step {step}: {reason}"
    if on_stop is not None:
        on_stop(trainer)
        return Stopping(message, remedy="go on from what was saved, when its services are back")
    directory = f"{trainer.run_id}/step-{step}"
    try:
        trainer.save(directory, storage="server")
    except GradwireError as error:
        return Stopping(
            message,
            expected="a checkpoint that the servers write",
            got=f"none: {error}",
            remedy="catch gradwire.Stopping and save, or give the trainer an on_stop that does",
        )
    return Stopping(
        message,
        got=f"its state is in {directory}, below the servers' --checkpoint-root",
        remedy=f'make a trainer anew, and go on with trainer.load("{directory}", storage="server")',
    )
