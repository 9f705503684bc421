"""The progress bar of a run: on a terminal only, drawn no more than twice a second to leave the cores to the work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gradwire.results import StepResult

_REFRESH_SECONDS = 0.5


def is_terminal() -> bool:
    """Whether progress would be seen: standard error is a terminal."""
    return sys.stderr.isatty()


class ProgressBar:
    """A bar on standard error; a context manager. `total` is the number of steps, None if it is not known.

    It can also be shown and finished within the block, where something is to be printed before or after it.
    """

    def __init__(self, total: int | None, description: str = "steps") -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # No thread of its own: it is drawn when a step is done.
            auto_refresh=False,
        )
        self._task = self._progress.add_task(description, start=False, total=total, figures="")
        self._drawn_at = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def start(self, done: int = 0) -> None:
        """Show it, with so many steps done before, and count the time from now on."""
        self._progress.start_task(self._task)
        self._progress.update(self._task, completed=done)
        self._progress.start()

    def finish(self) -> None:
        """Leave it as it is, and print below it from now on. Idempotent."""
        if self._progress.live.is_started:
            self._progress.refresh()
            self._progress.stop()

    @property
    def console(self) -> Console:
        """Print here while the bar is up."""
        return self._progress.console

    def show(self, result: StepResult, extra: str = "") -> None:
        """Count one finished step."""
        figures = f"loss {result.loss:.4f}  bubble {result.bubble:.0%}"
        if extra:
            figures += f"  {extra}"
        self._progress.update(self._task, advance=1, figures=figures)
        now = time.monotonic()
        if now - self._drawn_at >= _REFRESH_SECONDS:
            self._drawn_at = now
            self._progress.refresh()


def with_progress(results: Iterator[StepResult], total: int | None) -> Iterator[StepResult]:
    """Yield the results, and show each on a bar of its own."""
    with ProgressBar(total) as bar:
        for result in results:
            bar.show(result, f"{result.samples_per_second:.1f} samples/s")
            yield result
