"""The checkpoints in a run's directory: when they are made, how many are kept, which one a resumed run goes on from.

Leaves what is in them to gradwire.checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gradwire.checkpoint.background import Save
from gradwire.job.run_directory import checkpoint_steps
from gradwire.trainer import Trainer
from gradwire_protocol.checkpoint.directory import remove
from gradwire_protocol.checkpoint.reader import check
from gradwire_protocol.errors import CheckpointError, SettingsError

Batch = TypeVar("Batch")


class JobCheckpoints:
    """The directories step-N below one directory. `note` gets what the user should know."""

    def __init__(self, directory: Path, *, every: int | None, keep: int, note: Callable[[str], None]) -> None:
        self._directory = directory
        self._every = every
        self._keep = keep
        self._note = note
        self._open: Save | None = None
        self._saved = 0  # the step of the last one that was written

    def newest(self) -> Path:
        """Return the newest whole checkpoint, and note why newer ones are not; CheckpointError if there is none."""
        refused: CheckpointError | None = None
        for path in self._paths():
            try:
                check(path)
            except CheckpointError as error:
                refused = error
                self._note(str(error))
            else:
                return path
        raise CheckpointError(
            f"There is no checkpoint to go on from in {self._directory}",
            expected="a run that was started with --save-every",
            got=str(refused or "none"),
            remedy="train anew",
        )

    def saving(
        self,
        trainer: Trainer,
        batches: Iterable[Batch],
        step: int,
        position: Callable[[int], Mapping[str, Any]],
    ) -> Iterator[Batch]:
        """Yield the batches of the steps behind `step`; save when the step before is dispatched, where it is time.

        position: the place in the data after so many steps.
        """
        begin = step
        for batch in batches:
            self._look()
            if self._every is not None and step % self._every == 0 and step > begin:
                self._save(trainer, step, position(step))
            yield batch
            step += 1

    def finish(self, trainer: Trainer, step: int, position: Mapping[str, Any]) -> None:
        """Save after the last step, and wait for it. A failure is noted: the run's result does not depend on it."""
        if self._every is not None:
            self.save_now(trainer, step, position)

    def save_now(self, trainer: Trainer, step: int, position: Mapping[str, Any]) -> None:
        """Save what is not saved yet, also where no checkpoints are asked for, and wait for it. A failure is noted."""
        self._look()
        if self._saved != step:
            self._save(trainer, step, position)
        if self._open is not None:
            self._open.settle()
            self._look()

    def _save(self, trainer: Trainer, step: int, position: Mapping[str, Any]) -> None:
        path = self._directory / f"step-{step}"
        if self._open is not None:
            self._open.settle()
            self._look()
        try:
            self._open = trainer.save(path, data_position=position, wait=False)
        except CheckpointError as error:
            self._note(f"{error} Training goes on.")

    def _look(self) -> None:
        """See whether what is being written is done; note a failure."""
        save = self._open
        if save is None or not save.done:
            return
        self._open = None
        try:
            save.wait()
        except CheckpointError as error:
            self._note(f"{error} Training goes on.")
        else:
            self._saved = save.step
            self._thin_out()

    def _thin_out(self) -> None:
        for path in self._paths()[self._keep :]:
            try:
                remove(path)
            except OSError as error:
                self._note(f"The old checkpoint {path} could not be removed: {error}")

    def _paths(self) -> list[Path]:
        """Return all that are there under their final names, newest first."""
        found = checkpoint_steps(self._directory)
        return sorted(found, key=lambda path: -found[path])


def check_position(path: Path, saved: Mapping[str, Any] | None, present: Mapping[str, Any]) -> None:
    """SettingsError if the run would go on with other data than the checkpoint's."""
    different = [name for name, value in present.items() if (saved or {}).get(name) != value]
    if different:
        raise SettingsError(
            f"The run cannot go on from {path}: its batches would be others",
            expected=", ".join(f"{name} {(saved or {}).get(name)}" for name in different),
            got=", ".join(f"{name} {present[name]}" for name in different),
            remedy="give the data and settings of the run that was interrupted",
        )
