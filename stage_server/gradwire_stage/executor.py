"""The compute thread of a run: takes entries in order, reports each, and ends the run when one fails.

The stream's handler submits and reads reports; any thread may fail or release. Random generators are global, so
there is one such thread a process: the service starts the next only after this one has ended.
"""

from __future__ import annotations

import gc
import queue
import threading
import traceback
from collections.abc import Callable, Iterator

import structlog

from gradwire_protocol.errors import Aborted, GradwireError, LimitExceeded, StageFailed
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_stage import allocator
from gradwire_stage.checks import check_entry
from gradwire_stage.entries import run_entry
from gradwire_stage.run_state import RunState
from gradwire_stage.timeline import Timeline

# What the coordinator gets: of each entry, and how the writing of a SaveState entry went.
Report = run_pb2.EntryReport | run_pb2.SavedPart

# An honest coordinator has at most a window (16) open.
MAXIMUM_OPEN_ENTRIES = 64

_log = structlog.get_logger(__name__)


class Executor:
    """Runs one run's entries on a thread of its own, from construction until the run ends.

    `build` makes the run's state; it gets the function to call when something fails outside the compute thread.
    `on_end` is called on the compute thread when everything is freed.
    """

    def __init__(
        self, build: Callable[[Callable[[GradwireError], None]], RunState], on_end: Callable[[Executor], None]
    ) -> None:
        self.run = build(self.fail)
        self._on_end = on_end
        self._entries: queue.SimpleQueue[tuple[run_pb2.Entry, list[Action]] | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[Report | GradwireError | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._end: GradwireError | None = None  # why the run ends early
        self._next_number: int | None = None
        self._finished_number: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"compute {self.run.run}", daemon=True)
        self._thread.start()

    def submit(self, request: stage_pb2.ExecuteRequest) -> None:
        """Queue an entry. Raises what is wrong with it. For one thread: the one that reads the stream."""
        program = check_entry(
            request,
            run=self.run.run,
            generation=self.run.generation,
            number=self._next_number,
            stages=self.run.active_stages,
            replica=self.run.replica,
            end=self.run.agreement.end,
        )
        if self._entries.qsize() >= MAXIMUM_OPEN_ENTRIES:
            raise LimitExceeded("Too many entries are open", expected=f"{MAXIMUM_OPEN_ENTRIES} at most")
        self._next_number = request.entry.number + 1
        self._entries.put((request.entry, program))

    def close(self) -> None:
        """No more entries will come: the run ends, in good order, after those that are queued."""
        self._entries.put(None)

    def reports(self) -> Iterator[Report]:
        """Yield a report for each entry; ends with the run, or raises why it ended early.

        What was written of a SaveState entry comes when it is, in no order with the reports.
        """
        while (report := self._reports.get()) is not None:
            if isinstance(report, GradwireError):
                raise report
            yield report

    def fail(self, error: GradwireError) -> None:
        """End the run because of an error outside the compute thread. Any thread; does not wait."""
        self.release(_prefixed(f"{self._stages()}, in {self.run.progress.where()}", error))

    def release(self, reason: GradwireError) -> None:
        """End the run, whatever it is doing: waits end at once, an operator in progress first ends itself.

        Any thread; does not wait; the first reason stays.
        """
        with self._lock:
            if self._end is not None or self._ended.is_set():
                return
            self._end = reason
        self.run.abort(reason)
        self._entries.put(None)

    @property
    def ending(self) -> bool:
        """Whether the run was released or has failed, or has ended."""
        return self._end is not None or self._ended.is_set()

    @property
    def between_entries(self) -> bool:
        """Whether everything is done that came so far, and the run goes on."""
        done = self._finished_number
        return not self.ending and self._next_number == (None if done is None else done + 1)

    def wait_ended(self, timeout_seconds: float) -> bool:
        """Wait until the compute thread has let go of everything; return whether it has."""
        return self._ended.wait(timeout_seconds)

    def _main(self) -> None:
        outcome: GradwireError | None
        try:
            outcome = self._run_entries()
        except Exception as error:  # noqa: BLE001  # every failure of an entry ends the run, and is reported
            outcome = self._located(error)
            # Frames of the failed entry hold its tensors.
            traceback.clear_frames(error.__traceback__)
        try:
            self._clean_up(outcome)
        finally:
            # Whatever happens: the server is free, and nobody waits for this run.
            self._ended.set()
            self._on_end(self)
            if outcome is not None:
                self._reports.put(outcome)
            self._reports.put(None)

    def _clean_up(self, outcome: GradwireError | None) -> None:
        run = self.run
        if outcome is None:
            run.finish(Aborted(f"Run {run.run} has ended"))
        else:
            self.release(outcome)
        run.free()
        gc.collect()
        run.device.give_back_memory()
        allocator.give_back()

    def _run_entries(self) -> GradwireError | None:
        """Return None when all entries are done, or why the run was ended between two of them."""
        run = self.run
        run.device.enter_compute_thread()
        timeline = run.progress.timeline = Timeline(run.device.clock())
        while (item := self._entries.get()) is not None:
            if self._end is not None:
                break
            entry, program = item
            run.progress.entry = entry.number
            run.progress.advance()
            report = run_entry(run, timeline, entry, program, self._reports.put)
            run.progress.action, run.progress.doing = None, ""
            run.progress.advance()
            self._finished_number = entry.number
            self._reports.put(report)
        return self._end

    def _located(self, error: Exception) -> GradwireError:
        """Say where an entry failed: stage, action, micro-batch."""
        run = self.run
        if self._end is not None:
            # Released, or failed elsewhere: what the compute thread then ran into is only a consequence.
            return _prefixed("", self._end)
        where = f"{self._stages()} failed in {run.progress.where()}"
        _log.error("an entry failed", run=run.run, where=run.progress.where(), exc_info=error)
        if isinstance(error, GradwireError):
            return _prefixed(where, error)
        remedy = "see the stage server's log"
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
            remedy = "use more micro-batches, more stages, or a server with more memory"
        return StageFailed(where, got=f"{type(error).__name__}: {error}", remedy=remedy)

    def _stages(self) -> str:
        return self.run.name.capitalize()


def _prefixed(where: str, error: GradwireError) -> GradwireError:
    """Return a new error of the same class, without the frames that the old one holds on to."""
    message = f"{where}: {error.message}" if where else error.message
    return type(error)(message, expected=error.expected, got=error.got, remedy=error.remedy)
