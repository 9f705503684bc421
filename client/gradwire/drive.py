"""The client's end of a run's log: numbers entries, keeps at most `window` of them open, hands out their results.

Knows nothing of batches and tensors: session.py delivers those.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import grpc

from gradwire.calls import coordinator_stub
from gradwire.liveness import Liveness
from gradwire_protocol.errors import Aborted, GradwireError, InternalError, Unreachable, from_rpc_error
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

# A coordinator that gives no sign for this long does not answer.
SILENCE_SECONDS = 20.0


class Drive:
    """The Drive stream of one run. After a failure every open and later entry ends with that one error.

    The coordinator gives a sign of life each second. When there was none for `silence_seconds` it is frozen or cut off,
    and the run fails with Unreachable.
    """

    def __init__(
        self,
        channel: Any,
        run: str,
        generation: int,
        window: int,
        target: str,
        *,
        silence_seconds: float = SILENCE_SECONDS,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """on_failure: called once when the run fails, on any thread; must not block."""
        self._run = run
        self._generation = generation
        self._window = window
        self._target = target
        self._silence_seconds = silence_seconds
        self._on_failure = on_failure
        self._finished_number = 0
        self._changed = threading.Condition()
        self._last_number = 0
        # Reserved or submitted, without a result yet, in order of their numbers.
        self._open: deque[tuple[int, Future[run_pb2.EntryResult]]] = deque()
        # Of SaveState entries whose files are being written, by number.
        self._saves: dict[int, Future[run_pb2.SaveOutcome]] = {}
        self._failure: GradwireError | None = None
        # Why the run is to end before its next step; empty: it is not.
        self.stop_reason = ""
        self._requests: queue.SimpleQueue[coordinator_pb2.DriveRequest | None] = queue.SimpleQueue()
        self._stub = coordinator_stub(channel)
        self._call = self._stub.Drive(iter(self._requests.get, None))
        self.liveness = Liveness(f"liveness of {run}")
        self._heard_at = 0.0
        self.liveness.add(self._check_silence)
        self._reader = threading.Thread(target=self._read, name=f"results of {run}", daemon=True)
        self._reader.start()

    @property
    def failure(self) -> GradwireError | None:
        return self._failure

    @property
    def finished_number(self) -> int:
        """Number of the last entry that all servers have finished."""
        return self._finished_number

    def reserve(self) -> int:
        """Wait until fewer than `window` entries are open, and return the next entry's number; submit it next."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._open) < self._window)
            self._check()
            self._last_number += 1
            self._open.append((self._last_number, Future()))
            return self._last_number

    def wait_idle(self) -> None:
        """Wait until no entry is open. Raises the run's failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._open)
            self._check()

    def begin_generation(self, generation: int) -> None:
        """Entries are of this generation from now on. While none is open."""
        self._generation = generation

    def submit(self, entry: run_pb2.Entry) -> Future[run_pb2.EntryResult]:
        """Send the entry whose number was reserved last; its result comes in the future."""
        entry.generation = self._generation
        with self._changed:
            self._check()
            number, future = self._open[-1]
            if entry.number != number:
                raise InternalError("Entries were submitted out of order", expected=str(number), got=str(entry.number))
            self._requests.put(coordinator_pb2.DriveRequest(run=self._run, entry=entry))
            return future

    def submit_save(self, entry: run_pb2.Entry) -> tuple[Future[run_pb2.EntryResult], Future[run_pb2.SaveOutcome]]:
        """Submit a SaveState entry; the second future tells how the writing ends."""
        with self._changed:
            future = self.submit(entry)
            outcome = self._saves[entry.number] = Future()
            return future, outcome

    def request_stop(self, reason: str) -> None:
        """Note that the run is to end before its next step. The first reason stays. From any thread or signal."""
        self.stop_reason = self.stop_reason or reason

    def wait_failure(self, timeout_seconds: float) -> GradwireError | None:
        """Return the run's failure, waiting for it if need be; None if it has not failed by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure, timeout_seconds)
            return self._failure

    def fail(self, error: GradwireError) -> None:
        """End the run with an error that the coordinator does not see, for every waiter."""
        self._end(error)
        self._call.cancel()

    def abort(self, timeout_seconds: float) -> None:
        """End the run at once, whatever is open. Its servers are told when this returns, if they answer. Idempotent."""
        if self._failure is None:
            # If the coordinator does not answer: it and the servers find out by the streams that break.
            with contextlib.suppress(grpc.RpcError):
                self._stub.EndRun(coordinator_pb2.EndRunRequest(run=self._run), timeout=timeout_seconds)
        self._end(self._closed_error())
        self._call.cancel()
        self._reader.join()

    def close(self, timeout_seconds: float) -> None:
        """End the run: its servers are free when this returns, or the timeout has passed. Idempotent."""
        with self._changed:
            self._requests.put(None)
        self._reader.join(timeout_seconds)
        self._end(self._closed_error())
        if self._reader.is_alive():
            self._call.cancel()
            self._reader.join()

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _closed_error(self) -> GradwireError:
        return Aborted(f"The trainer of {self._run} is closed", remedy="make a new trainer")

    def _check_silence(self) -> None:
        silent_seconds = self.liveness.seconds - self._heard_at
        if silent_seconds >= self._silence_seconds:
            self.fail(
                Unreachable(
                    f"{self._target[:1].upper()}{self._target[1:]} has not been heard of for {silent_seconds:.0f} s",
                    expected="a sign of life each second",
                    got=f"none while {len(self._open)} entries were open",
                    remedy="see whether its process is stopped, and whether the network to it is up",
                )
            )

    def _read(self) -> None:
        try:
            for reply in self._call:
                self._heard_at = self.liveness.seconds
                if reply.HasField("result"):
                    self._finish(reply.result)
                elif reply.HasField("saved"):
                    self._finish_save(reply.saved)
                elif reply.HasField("stop"):
                    self.request_stop(reply.stop.reason)
        except grpc.RpcError as error:
            self._end(from_rpc_error(error, target=self._target))
            return
        self._end(Aborted("The coordinator ended the run", remedy="see the coordinator's log; make a new trainer"))

    def _finish_save(self, outcome: run_pb2.SaveOutcome) -> None:
        with self._changed:
            saved = self._saves.pop(outcome.entry, None)
        if saved is None:
            self.fail(InternalError("A checkpoint was written that was not asked for", got=f"entry {outcome.entry}"))
        else:
            saved.set_result(outcome)

    def _finish(self, result: run_pb2.EntryResult) -> None:
        with self._changed:
            if not self._open or self._open[0][0] != result.entry:
                expected = str(self._open[0][0]) if self._open else "no result"
                error = InternalError("A result came out of order", expected=expected, got=str(result.entry))
            else:
                error = None
                self._finished_number, future = self._open.popleft()
                future.set_result(result)
                self._changed.notify_all()
        if error is not None:
            self.fail(error)

    def _end(self, error: GradwireError) -> None:
        with self._changed:
            if self._failure:
                return
            self._failure = error
            while self._open:
                self._open.popleft()[1].set_exception(error)
            for saved in self._saves.values():
                saved.set_exception(error)
            self._saves.clear()
            self._requests.put(None)
            self._changed.notify_all()
        self.liveness.stop()
        if self._on_failure is not None:
            self._on_failure()
