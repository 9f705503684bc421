"""Joins a client's Drive stream and its run: entries in, outcomes out, and the end of the one when the other ends."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc

from gradwire_coordinator.outcomes import Outcome
from gradwire_coordinator.run import Run
from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import run_pb2

# A client hears from its stream at least this often.
SIGN_SECONDS = 1.0


def first_message(requests: Iterator[pb.DriveRequest], seconds: float) -> pb.DriveRequest | None:
    """Return the first message of a stream; None: it ended without one. FrameError if none comes in time."""
    found: queue.SimpleQueue[pb.DriveRequest | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            found.put(next(requests, None))
        except grpc.RpcError:  # the stream has broken
            found.put(None)

    # The stream's end ends it, at the latest.
    in_background(read)
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        raise FrameError(
            "A Drive stream was opened, and nothing sent",
            expected=f"a message that names its run, within {seconds:g} s",
        ) from None


def drive(
    run: Run, first: pb.DriveRequest, requests: Iterator[pb.DriveRequest], context: Any
) -> Iterator[pb.DriveReply]:
    """Take the run's one stream, whose first message has been read; yield what its client is told, until the end."""
    run.attach()

    def gone() -> None:
        # Called on gRPC's own thread, which must not wait.
        if not run.is_over:
            in_background(partial(run.end, "its client went away"))

    if not context.add_callback(gone):
        gone()
    in_background(partial(_follow, run, itertools.chain([first], requests), context))
    yield from map(_reply, run.outcomes.each(SIGN_SECONDS))


def in_background(work: Callable[[], None]) -> None:
    """Do what may have to wait on a thread of its own."""
    threading.Thread(target=work, daemon=True).start()


def _reply(outcome: Outcome | None) -> pb.DriveReply:
    if isinstance(outcome, run_pb2.SaveOutcome):
        return pb.DriveReply(saved=outcome)
    if isinstance(outcome, pb.StopRequest):
        return pb.DriveReply(stop=outcome)
    return pb.DriveReply(result=outcome)


def _follow(run: Run, requests: Iterator[pb.DriveRequest], context: Any) -> None:
    """Submit a client's entries until its stream ends; then the run ends too."""
    try:
        for request in requests:
            if request.run != run.run:
                raise FrameError(
                    "All messages of a stream name the same run", expected=run.run, got=repr(request.run[:80])
                )
            run.submit(request.entry)
    except grpc.RpcError:
        run.end("its client's stream broke")
    except Exception as error:  # noqa: BLE001  # whatever it is, the client gets it as the end of its stream
        run.fail(error)
    else:
        # gRPC ends the requests of a broken stream, too.
        if context.is_active():
            run.drain()
        else:
            run.end("its client went away")
