"""One run: its servers, its open entries, its results, and its one end.

Entries go to all servers at once, up to the window, and never wait for each other: a server starts an entry as soon as
it has finished the one before. Leaves to others: laying out (`layout.py`), what is valid (`entries.py`), which reports
are missing (`window.py`), whose fault a failure is (`failures.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc
import structlog

from gradwire_coordinator.entries import EntryRules
from gradwire_coordinator.failures import CauseFinder, Evidence, how_it_ended, own_error
from gradwire_coordinator.layout import Layout
from gradwire_coordinator.link import Link
from gradwire_coordinator.links import prepare_all, release_all
from gradwire_coordinator.metrics import RunStanding
from gradwire_coordinator.outcomes import Outcomes
from gradwire_coordinator.run_context import RunContext
from gradwire_coordinator.run_record import RunRecord
from gradwire_coordinator.saves import RunSaves, Writer
from gradwire_coordinator.stall_watch import StallWatch
from gradwire_coordinator.stop_request import StopState
from gradwire_coordinator.window import Window
from gradwire_protocol.errors import Aborted, FrameError, GradwireError, ServerBusy
from gradwire_protocol.v1 import coordinator_pb2, run_pb2, stage_pb2

_log = structlog.get_logger(__name__)


class Run:
    """A run from its preparation to its end. Thread-safe.

    It ends or fails exactly once; then every server is told to release it, whatever it is doing.
    """

    def __init__(
        self,
        run: str,
        generation: int,
        request: coordinator_pb2.CreateRunRequest,
        layout: Layout,
        context: RunContext,
    ) -> None:
        self.run = run
        self.generation = generation
        self._created_clock = time.monotonic()
        self._plan = request.plan
        self._rules = EntryRules(
            generation=generation,
            plan=request.plan,
            groups=request.optimizer.groups,
            has_predict=request.model.HasField("predict"),
        )
        self._context = context
        self._lock = threading.Lock()
        self._take_layout(layout)
        self._causes = CauseFinder(len(self._links), lambda cause: self.fail(cause.as_error()))
        self._driven = False
        self._draining = False
        self._replanning = False
        self.outcomes = Outcomes()
        self._record = RunRecord(run, request.description)
        self._error: GradwireError | None = None
        self._ending = False
        self._finished = threading.Event()
        self._stop = StopState()

    def prepare(
        self, request: coordinator_pb2.CreateRunRequest, for_servers: Sequence[stage_pb2.PrepareRequest]
    ) -> None:
        """Begin the log, prepare all servers and open their streams; the first failure ends the run and is raised."""
        with self._failing():
            self._context.log.create_run(self.run, self.generation, request)
            self._prepare(for_servers)

    def _take_layout(self, layout: Layout) -> None:
        """Set all that depends on the layout."""
        servers = layout.servers
        self.summary = layout.summary
        # Where each server stands, by its name.
        self.places = {server.server: place for server, place in zip(servers, layout.places, strict=True)}
        self._programs = layout.programs
        self._links = [
            Link(position, self.places[server.server], server.server, server.address, self._context.connect)
            for position, server in enumerate(servers)
        ]
        self._window = Window(
            [server.server for server in servers], loss_from=layout.loss_from, loss_copies=layout.loss_copies
        )
        self._watch = StallWatch(self.run, self.generation, self._plan, servers, layout.places, self._context.standing)
        # One replica, whose state is that of all: of it the first shards, who get what the others have; and those who
        # have the optimizer.
        writers = {link.position: Writer(link.place.stages[0], link.target) for link in self._links if link.place.leads}
        self._saves = RunSaves(self._context.checkpoints, writers, self._on_save_done)

    def _prepare(self, for_servers: Sequence[stage_pb2.PrepareRequest]) -> list[stage_pb2.PrepareReply]:
        """Prepare all servers, and open their streams."""
        replies = prepare_all(self._links, for_servers, self._context.on_lost)
        # Within the lock, so that the end of the run cannot close what is being opened.
        with self._lock:
            if self._ending:
                raise self._over()
            for link in self._links:
                link.open(self._on_report, self._on_saved, self._on_end)
        return replies

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """End the run with whatever fails within."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            # What ended the run first is the cause: breaking off the preparation may be its consequence.
            if self._error is not None and self._error is not error:
                raise self._error from error
            raise

    # What another layout does.

    @contextmanager
    def between_entries(self) -> Iterator[None]:
        """Keep the run between two of its entries. ServerBusy if it is not; the run's end if it is over."""
        with self._lock:
            if self._ending:
                raise self._over()
            if not self._driven or self._replanning or self._window or self._saves:
                raise ServerBusy(
                    f"Run {self.run} is not between two entries",
                    expected="a run with a client, all entries finished, and all checkpoints written",
                    remedy="wait for the results of what was sent",
                )
            self._replanning = True
        try:
            yield
        finally:
            with self._lock:
                self._replanning = False

    def switch(self, generation: int, layout: Layout) -> list[stage_pb2.PrepareReply]:
        """Have another layout take the run over, between entries; return what servers say. A failure ends the run."""
        with self._lock:
            if self._ending:
                raise self._over()
            links, saves, self.generation = self._links, self._saves, generation
            self._take_layout(layout)
        saves.close()
        try:
            with self._failing():
                self._context.log.begin_generation(self.run, generation)
                return self._prepare(layout.prepare)
        finally:
            # The servers have left the generation before.
            for link in links:
                link.close()

    def expect(self, new_plan: run_pb2.NewPlan) -> None:
        """Take this entry next, and no other."""
        self._rules.begin_generation(self.generation, new_plan)

    # What the client does.

    def attach(self) -> None:
        """Take the one Drive stream of this run; ServerBusy if it has had one, the run's end if it is over."""
        with self._lock:
            if self._ending:
                raise self._over()
            if self._driven:
                raise ServerBusy(
                    f"Run {self.run} is driven by another stream already", remedy="drive a run from one client only"
                )
            self._driven = True

    def submit(self, entry: run_pb2.Entry) -> None:
        """Check the client's next entry, log it, and send it to all servers; a typed error if it is not valid."""
        with self._lock:
            if self._ending:
                raise self._over()
            if self._replanning:
                raise FrameError(f"An entry came while run {self.run} is planned anew", expected="none", got="one")
            self._rules.check(entry, len(self._window))
            saves = entry.HasField("save_state")
            if saves:
                self._saves.check(entry.save_state)
            programs = self._programs.of_entry(entry)
            self._context.log.append(self.run, entry)
            now = time.monotonic()
            self._watch.client_acted(now)
            self._window.add(entry, now)
            if saves:
                self._saves.dispatched(entry.number)
            self._record.sent(entry)
            for link, program in zip(self._links, programs, strict=True):
                link.send(stage_pb2.ExecuteRequest(run=self.run, entry=entry, program=program))

    def begin_save(self, request: coordinator_pb2.BeginSaveRequest) -> str:
        """Make ready for a checkpoint that servers write; return its token. A typed error if it cannot be written."""
        with self._lock:
            if self._ending:
                raise self._over()
        return self._saves.begin(request.directory, request.manifest)

    def drain(self) -> None:
        """The client sends no more: end when the open entries are finished, and checkpoints written."""
        with self._lock:
            self._draining = True
            last = self._drained
        if last:
            self._finish(coordinator_pb2.RUN_STATE_ENDED, None)

    @property
    def _drained(self) -> bool:
        return self._draining and not self._window and not self._saves

    def ask_to_stop(self, reason: str, seconds: float) -> None:
        """Ask its client to end the run in good order; `overdue` tells when it has not. Idempotent.

        reason: who was asked to stop, and so stops in this time.
        """
        with self._lock:
            if self._ending:
                return
            request = self._stop.ask(reason, seconds, time.monotonic())
        if request is not None:
            _log.info("run asked to stop", run=self.run, reason=reason)
            self.outcomes.put(request)

    def overdue(self) -> str:
        """Return why the run must be ended, since its client has not done what it was asked to; empty: no reason."""
        with self._lock:
            return "" if self._ending else self._stop.overdue(time.monotonic())

    def end(self, reason: str) -> None:
        """End the run, whatever is open; a client that still drives it gets Aborted with the reason.

        Returns when its servers are free. Idempotent.
        """
        self._finish(coordinator_pb2.RUN_STATE_ENDED, Aborted(f"Run {self.run} was ended: {reason}"))

    def fail(self, error: BaseException) -> None:
        """Fail the run with an error that no server is to blame for. Returns when its servers are free. Idempotent."""
        self._finish(coordinator_pb2.RUN_STATE_FAILED, own_error(error))

    # What the servers do.

    def server_lost(self, server: str, seen: str, last_known: str) -> None:
        """Take note that the registry has lost one of the servers."""
        link = next(link for link in self._links if link.server == server)
        self._causes.add(self._evidence_of(link, last_known=last_known, seen=seen))

    def find_stall(self) -> GradwireError | None:
        """Return why the run stands still for longer than its plan allows; None if it does not."""
        with self._lock:
            return None if self._ending else self._watch.find(self._window, time.monotonic())

    def _on_report(self, link: Link, report: run_pb2.EntryReport) -> None:
        with self._lock:
            if self._ending or link not in self._links:
                return
            finished = self._window.report(link.position, report, time.monotonic())
            if finished is None:
                return
            entry, result = finished
            self._context.log.record_result(self.run, result)
            self._record.finished(entry, result)
            self._context.on_result(self, entry, result)
            self.outcomes.put(result)
            last = self._drained
        if last:
            self._finish(coordinator_pb2.RUN_STATE_ENDED, None)

    def _on_saved(self, link: Link, part: run_pb2.SavedPart) -> None:
        if part.generation == self.generation and not self._ending:
            self._saves.take(link.position, part)

    def _on_save_done(self, outcome: run_pb2.SaveOutcome, directory: str, step: int) -> None:
        with self._lock:
            if not outcome.HasField("failure"):
                stored = self._record.stored(directory, step)
                self._context.log.record_checkpoint(self.run, outcome.entry, stored)
            self.outcomes.put(outcome)
            self._saves.forget(outcome.entry)
            last = self._drained
        if last:
            self._finish(coordinator_pb2.RUN_STATE_ENDED, None)

    def _on_end(self, link: Link, failure: Exception | None) -> None:
        if self._ending or link not in self._links:
            return  # another generation goes on, or nothing does
        if not (failure is None or isinstance(failure, grpc.RpcError | GradwireError)):
            self.fail(failure)
            return
        reported, seen = how_it_ended(failure, link.target)
        evidence = self._evidence_of(link, reported=reported, seen=seen)
        if isinstance(failure, grpc.RpcError) and reported is None:
            self._context.on_lost(link.server)
        self._causes.add(evidence)

    def _evidence_of(
        self, link: Link, *, reported: GradwireError | None = None, seen: str = "", last_known: str = ""
    ) -> Evidence:
        with self._lock:
            owed = self._window.owed_by(link.position)
            moment = f"during entry {owed.number}" if owed else "between entries"
        return Evidence(
            place=link.place,
            server=link.server,
            address=link.address,
            moment=moment,
            last_known=last_known or self._context.last_known(link.server),
            reported=reported,
            seen=seen,
        )

    # The end.

    def _finish(self, state: coordinator_pb2.RunState, error: GradwireError | None) -> None:
        """End the run once; `error` is what its client gets, None if it has closed the run itself."""
        with self._lock:
            first, self._ending = not self._ending, True
            if first:
                self._error = error
                reason = str(error) if error else "its client closed it"
                if error is None and self._stop.reason:
                    reason += f", as it was asked to: {self._stop.reason}"
                self._record.ended(state, reason)
                self._causes.close()
        if not first:
            self._finished.wait()
            return
        try:
            release_all(self._links, self.run, self.generation, self._record.reason)
            self._saves.close()
            self._context.log.finish_run(self.run, state, self._record.reason)
        finally:
            self._context.on_finished(self)
            self.outcomes.end(error)
            self._finished.set()
        _log.info("run ended", run=self.run, state=coordinator_pb2.RunState.Name(state), reason=self._record.reason)

    def join(self) -> None:
        """Wait for this run's threads, after its end."""
        self._finished.wait()
        for link in self._links:
            link.join()

    def _over(self) -> GradwireError:
        if self._error is not None:
            return self._error
        return Aborted(f"Run {self.run} is over", got=self._record.reason, remedy="create a new run")

    # What others may know.

    @property
    def is_over(self) -> bool:
        """Whether the run has ended or failed and its servers are free."""
        return self._finished.is_set()

    @property
    def state(self) -> coordinator_pb2.RunState:
        """The run's state; it is ended or failed as soon as it begins to end."""
        return self._record.state

    @property
    def failure(self) -> GradwireError | None:
        """What the run failed of; None if it has not."""
        return self._error if self._record.state == coordinator_pb2.RUN_STATE_FAILED else None

    def standing(self) -> RunStanding:
        """Return what metrics show of a run that is not over."""
        with self._lock:
            still_seconds = self._watch.still_seconds(self._window, time.monotonic())
            record = self._record
            return RunStanding(self.run, record.created_at, len(self._window), still_seconds, record.saved_at)

    def undriven_seconds(self) -> float:
        """Return for how long the run has waited for its client; 0 once it has one."""
        with self._lock:
            return 0.0 if self._driven or self._ending else time.monotonic() - self._created_clock

    def status(self) -> coordinator_pb2.RunStatus:
        """Return what displays show."""
        with self._lock:
            return self._record.status(self.generation, self.summary)
