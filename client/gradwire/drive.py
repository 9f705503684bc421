"""The client's end of a run's log: numbers entries, keeps at most `window` of them open, hands out their results.

Knows nothing of batches and tensors: session.py delivers those.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

import grpc

from gradwire.calls import coordinator_stub
from gradwire_protocol.errors import Aborted, GradwireError, InternalError, from_rpc_error
from gradwire_protocol.v1 import coordinator_pb2, run_pb2


class Drive:
    """The Drive stream of one run. After a failure every open and later entry ends with that one error."""

    def __init__(self, channel: Any, run: str, generation: int, window: int, target: str) -> None:
        self._run = run
        self._generation = generation
        self._window = window
        self._target = target
        self._changed = threading.Condition()
        self._last_number = 0
        # Reserved or submitted, without a result yet, in order of their numbers.
        self._open: deque[tuple[int, Future[run_pb2.EntryResult]]] = deque()
        self._failure: GradwireError | None = None
        self._requests: queue.SimpleQueue[coordinator_pb2.DriveRequest | None] = queue.SimpleQueue()
        self._call = coordinator_stub(channel).Drive(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name=f"results of {run}", daemon=True)
        self._reader.start()

    @property
    def failure(self) -> GradwireError | None:
        return self._failure

    def reserve(self) -> int:
        """Wait until fewer than `window` entries are open, and return the next entry's number; submit it next."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._open) < self._window)
            self._check()
            self._last_number += 1
            self._open.append((self._last_number, Future()))
            return self._last_number

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

    def wait_failure(self, timeout_seconds: float) -> GradwireError | None:
        """Return the run's failure, waiting for it if need be; None if it has not failed by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure, timeout_seconds)
            return self._failure

    def fail(self, error: GradwireError) -> None:
        """End the run with an error that the coordinator does not see, for every waiter."""
        self._end(error)
        self._call.cancel()

    def close(self, timeout_seconds: float) -> None:
        """End the run: its servers are free when this returns, or the timeout has passed. Idempotent."""
        with self._changed:
            self._requests.put(None)
        self._reader.join(timeout_seconds)
        self._end(Aborted(f"The trainer of {self._run} is closed", remedy="make a new trainer"))
        if self._reader.is_alive():
            self._call.cancel()
            self._reader.join()

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _read(self) -> None:
        try:
            for reply in self._call:
                self._finish(reply.result)
        except grpc.RpcError as error:
            self._end(from_rpc_error(error, target=self._target))
            return
        self._end(Aborted("The coordinator ended the run", remedy="see the coordinator's log; make a new trainer"))

    def _finish(self, result: run_pb2.EntryResult) -> None:
        with self._changed:
            if not self._open or self._open[0][0] != result.entry:
                expected = str(self._open[0][0]) if self._open else "no result"
                error = InternalError("A result came out of order", expected=expected, got=str(result.entry))
            else:
                error = None
                _, future = self._open.popleft()
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
            self._requests.put(None)
            self._changed.notify_all()
