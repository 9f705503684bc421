"""Writes of checkpoints on a thread of their own: one at a time, and none that fails in silence.

What is written is the caller's.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from gradwire_protocol.errors import CheckpointError, GradwireError


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written in the background; training goes on."""


class Save:
    """A checkpoint on its way to disk. step: training steps that its state has seen."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step
        self._finished = threading.Event()
        self._failure: GradwireError | None = None
        self._told = False

    @property
    def done(self) -> bool:
        """Whether it is written, or has failed."""
        return self._finished.is_set()

    def settle(self) -> None:
        """Wait until it is written, or has failed; `wait` tells which."""
        self._finished.wait()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until it is written; return False if the timeout passes first. Raises why it could not be written.

        That is CheckpointError for a full disk and the like, and the run's own failure if there was one.
        """
        if not self._finished.wait(timeout_seconds):
            return False
        if self._failure is not None:
            self._told = True
            raise self._failure
        return True


class Saves:
    """The writes of one trainer. For one thread."""

    def __init__(self) -> None:
        self._open: Save | None = None

    def start(self, path: Path, step: int, write: Callable[[], None]) -> Save:
        """Run `write` on a thread, after the write before has ended."""
        self.settle()
        self.report()
        save = Save(path, step)

        def run() -> None:
            try:
                write()
            except GradwireError as error:
                save._failure = error
            except Exception as error:  # noqa: BLE001  # whatever it is: told where the checkpoint is waited for
                save._failure = CheckpointError(
                    f"The checkpoint {path} could not be written", got=f"{type(error).__name__}: {error}"
                )
            finally:
                save._finished.set()

        self._open = save
        threading.Thread(target=run, name=f"write {path.name}", daemon=True).start()
        return save

    def settle(self) -> None:
        """Wait until nothing is being written."""
        if self._open is not None:
            self._open.settle()

    def report(self) -> None:
        """Warn of a write that has failed, once, unless somebody has waited for it and knows."""
        save = self._open
        if save is None or not save.done:
            return
        self._open = None
        # The run's own failure is raised by whatever is called.
        if isinstance(save._failure, CheckpointError) and not save._told:
            warnings.warn(f"{save._failure} Training goes on.", CheckpointWarning, stacklevel=4)
