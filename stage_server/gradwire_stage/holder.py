"""Which run holds a stage server: one at most, from its preparation to its end, and who may take its place.

Leaves to others: what calls ask for (service.py), what a run is made of (run_state.py), and carrying it out
(executor.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from gradwire_protocol.errors import Aborted, GradwireError, RunNotFound, ServerBusy, StaleGeneration
from gradwire_stage.ended_runs import EndedRuns
from gradwire_stage.executor import Executor
from gradwire_stage.kept_state import KeptState
from gradwire_stage.run_state import RunState

# A run that is released ends within this time, unless a single operator takes longer.
_RELEASE_SECONDS = 1.0
_TAKE_OVER_SECONDS = 5.0
# Makes a run's state, with whom to tell of a failure, and with what the generation before has left.
MakeRun = Callable[[Callable[[GradwireError], None], KeptState | None], RunState]

_log = structlog.get_logger(__name__)


class _Held:
    """The run that holds the server, and whether its Execute stream is open."""

    def __init__(self, executor: Executor, prepared_seconds: float) -> None:
        self.executor = executor
        self.executing = False
        # A coordinator may vanish before it opens its Execute stream.
        self.expiry = threading.Timer(prepared_seconds, self._expire)
        self.expiry.daemon = True
        self.expiry.start()

    def _expire(self) -> None:
        if not self.executing:
            self.executor.release(Aborted("The coordinator opened no Execute stream in time"))


class Holder:
    """Of one server, which errors name. prepared_seconds: a run waits so long for its Execute stream. Thread-safe."""

    def __init__(self, server: str, prepared_seconds: float) -> None:
        self._server = server
        self._prepared_seconds = prepared_seconds
        self._lock = threading.Lock()  # guards _held
        self._preparing = threading.Lock()  # one preparation at a time, and no measurement beside it
        self._held: _Held | None = None
        self._ended = EndedRuns(server)

    @property
    def current(self) -> Executor | None:
        """What carries the run out that is here; None if there is none."""
        held = self._held
        return None if held is None else held.executor

    @property
    def is_preparing(self) -> bool:
        """Whether a run is prepared, or something measured."""
        return self._preparing.locked()

    def find(self, run: str, generation: int) -> RunState | None:
        """Return a run if it is the one that is here, in this generation."""
        executor = self.current
        if executor is None or (executor.run.run, executor.run.generation) != (run, generation):
            return None
        return executor.run

    def prepare(
        self, run: str, generation: int, make: MakeRun, *, takes_over: bool
    ) -> tuple[RunState, KeptState | None]:
        """Give the server to a run, in the place of its own generation before; return it, and what that has left.

        takes_over: with the state of the generation before. ServerBusy if another run is here; StaleGeneration if this
        one is over.
        """
        with self._preparing:
            self._ended.check(run, generation)
            kept = self._kept_for(run) if takes_over else None
            self._make_room(run, generation)
            executor = Executor(lambda fail: make(fail, kept), self._on_end)
            with self._lock:
                self._held = _Held(executor, self._prepared_seconds)
            try:
                # Released while it was prepared: its coordinator does not wait for it any more.
                self._ended.check(run, generation)
            except StaleGeneration as error:
                executor.release(error)
                raise
        return executor.run, kept

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Keep the server free of runs for a measurement. ServerBusy if it is not free."""
        if not self._preparing.acquire(blocking=False):
            raise ServerBusy(f"Stage server {self._server} prepares a run, or measures costs", expected="a free server")
        try:
            self._make_room("", 0)
            yield
        finally:
            self._preparing.release()

    def execute(self) -> Executor:
        """Return what carries the run out, for the one Execute stream that it has. RunNotFound, ServerBusy."""
        with self._lock:
            held = self._held
            if held is None:
                raise RunNotFound("No run is prepared on this server", remedy="prepare it first")
            if held.executing:
                raise ServerBusy(f"Run {held.executor.run.run} has an Execute stream already")
            held.executing = True
            held.expiry.cancel()
            return held.executor

    def release(self, run: str, generation: int, reason: str) -> None:
        """End a run up to this generation, here or yet to come, and wait for that a moment. Idempotent."""
        # First: a preparation that is on its way sees it afterwards.
        self._ended.note(run, generation)
        executor = self.current
        if executor is not None and executor.run.run == run and executor.run.generation <= generation:
            _log.info("released", run=run, generation=executor.run.generation, reason=reason)
            executor.release(Aborted(f"Run {run} was released", got=reason))
            executor.wait_ended(_RELEASE_SECONDS)

    def release_orphan(self, reason: str) -> None:
        """End the run that is here, if there is one, behind which no coordinator stands. Does not wait."""
        executor = self.current
        if executor is not None:
            executor.release(Aborted("The run has lost its coordinator", got=reason))

    def release_all(self, reason: str) -> None:
        """End whatever runs here, and wait for it a moment. For the end of the process."""
        executor = self.current
        if executor is not None:
            executor.release(Aborted(f"Stage server {self._server} ends", got=reason))
            executor.wait_ended(_TAKE_OVER_SECONDS)

    def _kept_for(self, run: str) -> KeptState:
        """Return the state of the generation before."""
        executor = self.current
        if executor is None or executor.run.run != run or not executor.between_entries:
            raise StaleGeneration(
                "The run's generation before cannot be taken over",
                expected=f"run {run} on server {self._server}, between two entries",
                got="no run" if executor is None else f"run {executor.run.run}, {executor.run.progress.where()}",
            )
        return KeptState.of(executor.run)

    def _make_room(self, run: str, generation: int) -> None:
        """Raise ServerBusy unless the server is free, or held by a run that ends or is replaced by this one."""
        executor = self.current
        if executor is None:
            return
        old = executor.run
        if old.run == run and old.generation < generation:
            executor.release(Aborted(f"Run {run} goes on as generation {generation}"))
        if executor.ending and executor.wait_ended(_TAKE_OVER_SECONDS):
            return
        raise ServerBusy(
            f"Stage server {self._server} is held by another run",
            expected="a free server",
            got=f"run {old.run}, generation {old.generation}",
            remedy="end that run, or start more stage servers",
        )

    def _on_end(self, executor: Executor) -> None:
        self._ended.note(executor.run.run, executor.run.generation)
        with self._lock:
            if self._held is not None and self._held.executor is executor:
                self._held.expiry.cancel()
                self._held = None
        _log.info("the run has ended here", run=executor.run.run, generation=executor.run.generation)
