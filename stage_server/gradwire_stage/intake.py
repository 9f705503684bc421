"""One `Deliver` stream of a stage server: frames in, receipts out.

Has room reserved for each message before its payload is put together, and lets go what is to be dropped. Which run a
message belongs to is the service's to say; what becomes of it, the run's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gradwire_protocol.errors import FrameError
from gradwire_protocol.frames import Admission, FrameAssembler, encode_first_frame
from gradwire_protocol.local_stream import MAXIMUM_KINDS, ShortFrame
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.known_kinds import KnownKind
from gradwire_stage.mailbox import Inflow, Reservation
from gradwire_stage.run_state import RunState


class Whole(NamedTuple):
    """A message that is whole, for its receipt."""

    sequence: int
    size_bytes: int  # of its payload


class Intake:
    """Takes the frames of one stream, on one thread at a time. `find_run` gets each message's key; None: drop it."""

    def __init__(self, find_run: Callable[[pb.MessageKey], RunState | None], tensor_bytes: int) -> None:
        self._find_run = find_run
        self._assembler = FrameAssembler(tensor_bytes, self._admit, self._shared)
        # The run that this stream brings messages for, what it has brought, and room for the message in progress.
        self._run: RunState | None = None
        self._inflow: Inflow | None = None
        self._reservation: Reservation | None = None
        self._addressed: RunState | None = None  # the run of the message in progress
        # Kinds that short frames name: a header of each, and what is known of it where its run is here.
        self._kinds: list[tuple[pb.TensorHeader, RunState | None, KnownKind | None]] = []
        self._ended = False
        self._wait = True

    def feed(self, frame: bytes, *, wait: bool = True, first: bool = False) -> Whole | None:
        """Take one frame; return the message that it completes, for its receipt.

        Waits for room; without `wait`, HeldError where it would: the same frame may be fed again later. first: the
        message is the first of a kind that short frames will name.
        """
        self._wait = wait
        message = self._assembler.feed(frame)
        run, reservation = self._run, self._reservation
        if run is not None and reservation is not None:
            run.note_frame(reservation.key.direction)
            if message is not None:
                self._reservation = None
                if message.kept:
                    run.accept(message, reservation)
                else:  # the run has ended meanwhile
                    run.mailbox.cancel(reservation)
        if first:
            self._note_kind(None if message is None else message.header)
        return None if message is None else Whole(message.header.sequence, message.header.tensor.size_bytes)

    def feed_short(self, data: bytes) -> Whole:
        """Take one encoded ShortFrame. HeldError where it would have to wait: it may be fed again later."""
        short = ShortFrame.decode(data)
        if short.kind >= len(self._kinds):
            raise FrameError(
                "A short frame names an unknown kind", expected=f"of {len(self._kinds)}", got=f"{short.kind}"
            )
        header, run, kind = self._kinds[short.kind]
        size = header.tensor.size_bytes
        if short.payload.nbytes != size or short.entry == 0 or self._assembler.header is not None:
            raise FrameError(
                "A short frame does not fit its kind, or comes inside a message",
                expected=f"{size} bytes of {header.key.value!r}, and an entry of 1 or more",
                got=f"{short.payload.nbytes} bytes, entry {short.entry}",
            )
        inflow = self._inflow
        if (
            kind is None
            or run is None
            or inflow is None
            or run is not self._run
            or self._find_run(header.key) is not run
        ):
            return self._feed_whole(header, short)
        run.receive(kind, short.entry, short.micro_batch, short.payload, inflow)
        return Whole(self._assembler.count_message(), size)

    def _feed_whole(self, header: pb.TensorHeader, short: ShortFrame) -> Whole:
        """Take a short frame as the frame that it stands for."""
        header.key.entry, header.key.micro_batch = short.entry, short.micro_batch
        header.sequence = self._assembler.sequence + 1
        whole = self.feed(encode_first_frame(header, short.payload), wait=False)
        if whole is None:
            raise FrameError("A short frame is not a message", got=f"{short.payload.nbytes} bytes")
        return whole

    def _note_kind(self, header: pb.TensorHeader | None) -> None:
        """Keep what a message is of, the first of its kind."""
        if header is None or not header.tensor.size_bytes or header.tensor.HasField("shared"):
            raise FrameError("The first of a kind is not one frame with a payload", expected="a message of one chunk")
        if len(self._kinds) >= MAXIMUM_KINDS:
            raise FrameError("Too many kinds of messages", expected=f"{MAXIMUM_KINDS} at most")
        run = self._run if self._addressed is self._run else None
        self._kinds.append((header, run, None if run is None else run.kind_of(header)))

    def finish(self) -> None:
        """Refuse a stream that ends inside a message."""
        self._assembler.finish()

    def interrupt(self) -> None:
        """End every wait of `feed`: the stream has ended. Any thread; idempotent."""
        self._ended = True
        run, inflow = self._run, self._inflow
        if run is not None and inflow is not None:
            run.mailbox.end(inflow)

    def close(self) -> None:
        """Give back what is reserved. On the thread of `feed`, after its last call."""
        self._leave()

    def _admit(self, header: pb.TensorHeader, size: int) -> Admission:
        run = self._addressed = self._find_run(header.key)
        if run is None:
            return Admission.SKIP
        inflow = self._inflow
        if run is not self._run or inflow is None:
            self._leave()
            inflow = run.mailbox.open_stream()
            self._run, self._inflow = run, inflow
            if self._ended:  # `interrupt` may have come too early to see these
                run.mailbox.end(inflow)
        self._reservation = run.admit(header, size, inflow, wait=self._wait)
        if self._reservation is None:
            return Admission.SKIP
        return Admission.KEEP_CHECKED if run.checksums else Admission.KEEP

    def _shared(self, slot: pb.SharedSlot, size: int) -> memoryview | None:
        """Return the payload of the message in progress, out of a block that this stream's sender has offered."""
        return None if self._addressed is None else self._addressed.shared.payload(slot, size, self)

    def _leave(self) -> None:
        run, inflow, reservation = self._run, self._inflow, self._reservation
        if run is not None and inflow is not None:
            if reservation is not None:
                run.mailbox.cancel(reservation)
            run.mailbox.end(inflow)
            run.shared.end(self)
        self._run = self._inflow = self._reservation = None
