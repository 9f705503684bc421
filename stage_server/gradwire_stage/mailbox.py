"""Where messages for a run wait until the compute thread takes them, whatever order they came in.

gRPC threads put, one compute thread takes; where the bell it waits at reads streams itself (local_streams.py), it does
both. Repeated and late messages are counted and dropped; what a message holds, and whether it belongs to this run at
all, is decided outside.

A stream that brings more than its credit is held back: its thread waits in `reserve`, nobody reads on, and gRPC's own
flow control stops the sender; or, where nobody may wait with it, it is asked again when the compute thread goes on.
Never held back is what is *due*: what belongs to the micro-batch that the compute thread is at, or to one before it;
what the schedule of the training step in progress bounds; and what comes on a stream that the compute thread waits for.

So no circle of waits can form. Let the front of a server be (entry, micro-batch) of the forward that it has begun last.
Who waits for a message waits for one that has not been sent, as its stream is read on. It comes from a server whose
front is not ahead of its own: a forward of the own front is not made yet, and no stage runs further ahead before a
backward than the stages before it do. Who waits to send waits for a server whose front is behind its own: otherwise the
message would be due there. Around a circle fronts could thus only stay or fall, so nobody in it waits to send; and of
waits for messages alone there is none, which the coordinator has proved of its programs. For the client, which sends
micro-batch by micro-batch to all servers and waits for none, the same holds.

Tensor-parallel servers of the same stages stop in the middle of an action for what the others have of it, and nothing
but such parts comes on the streams between them. Those parts are thus all due while one is waited for, however large,
and each stream brings them in the order in which they are asked for; for all run the same program. So whoever has not
sent a part is behind in it, and its front is not ahead: in circles with waits to send nothing changes. Of waits for
messages alone, take the order of actions that proves the programs: each wait leads from one action to an earlier one,
or within an action from one part to a part before it, and so never round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from gradwire_protocol.errors import Aborted, GradwireError, LimitExceeded
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage.bell import Bell, PlainBell
from gradwire_stage.keys import FROM_CLIENT, Key, Source

Content = TypeVar("Content")

# What a message costs besides its payload: key, header, Python objects. Bounds the number of empty messages.
OVERHEAD_BYTES = 1024
# Of one stream, untaken, before it is held back.
CREDIT_BYTES = 64 * 2**20
MAXIMUM_STREAMS = 256
# How much later a lasting message may come, in entries: more than may be open at once.
_LASTING_ENTRIES = 64
_STATE = frozenset({pb.DIRECTION_STATE, pb.DIRECTION_MOVED})


class HeldError(Exception):
    """A stream would have to wait for room, and its thread must not."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the compute thread waits for, and since when (time.monotonic)."""

    key: Key
    since: float


class Inflow:
    """What one stream has brought for one run, and nobody has taken yet. Guarded by the mailbox's lock."""

    __slots__ = ("ended", "messages", "size_bytes")

    def __init__(self) -> None:
        self.messages = 0
        self.size_bytes = 0
        self.ended = False


class Reservation(NamedTuple):
    """Room for one message that is on its way in."""

    key: Key
    size: int
    inflow: Inflow


class Mailbox(Generic[Content]):
    """Messages by key, within a limit on their total size. Thread-safe.

    `on_drop` gets the reason of every dropped message: "repeated", "late" or "released". bounds: how many messages of a
    source can lie untaken in a training step; where one is missing, the credit alone holds. stream_of: names the stream
    that a message comes on. bell: where the compute thread waits. lasting: directions whose messages are of use after
    their entry has finished, and stay until they are taken.
    """

    def __init__(
        self,
        maximum_bytes: int,
        on_drop: Callable[[str], None],
        *,
        credit_bytes: int = CREDIT_BYTES,
        maximum_streams: int = MAXIMUM_STREAMS,
        bounds: Mapping[Source, int] = MappingProxyType({}),
        stream_of: Callable[[Key], Hashable] = lambda key: (key.direction in FROM_CLIENT, key.source_stage),
        bell: Bell | None = None,
        lasting: Collection[int] = (),
    ) -> None:
        self._maximum_bytes = maximum_bytes
        self._credit_bytes = credit_bytes
        self._maximum_streams = maximum_streams
        self._on_drop = on_drop
        self._bounds = bounds
        self._stream_of = stream_of
        self._bell = bell or PlainBell()
        self._lasting = frozenset(lasting)
        self._taker = 0  # the thread that waits, or has waited last
        self._room = threading.Condition(threading.Lock())  # for streams that are held back
        self._held = 0
        self._streams: set[Inflow] = set()
        self._items: dict[Key, tuple[Content, int, Inflow | None]] = {}
        self._taken: set[Key] = set()  # of entries that are not finished
        # Micro-batches that are untaken, or on their way in, of sources with a bound.
        self._untaken: dict[tuple[int, Source], set[int]] = {}
        self._finished = 0  # the last finished entry
        self._front = (0, 0)  # entry in progress, micro-batch of the last forward begun
        self._training = False  # whether the entry in progress is a training step
        self._bytes = 0
        self._closed: GradwireError | None = None
        self._waiting: Waiting | None = None

    @property
    def size_bytes(self) -> int:
        """Of what is here or has room reserved."""
        return self._bytes

    @property
    def waiting(self) -> Waiting | None:
        return self._waiting

    @property
    def held_streams(self) -> int:
        """Threads that wait for room in `reserve`."""
        return self._held

    # --- streams

    def open_stream(self) -> Inflow:
        """Begin to take messages from one more stream, until `end`. LimitExceeded."""
        with self._room:
            if len(self._streams) >= self._maximum_streams:
                raise LimitExceeded(
                    "Too many streams bring messages of this run",
                    expected=f"{self._maximum_streams} at most",
                    remedy="send all messages from one place on one stream",
                )
            inflow = Inflow()
            self._streams.add(inflow)
            return inflow

    def reserve(
        self, key: Key, payload_bytes: int, inflow: Inflow, *, answered: bool = False, wait: bool = True
    ) -> Reservation | None:
        """Take room for a message before its payload comes, waiting for it; None if the message is to be dropped.

        `answered`: its sender waits for an answer in the same step (a gradient is one), so that the schedule bounds how
        many there are. LimitExceeded if there are more, or if there is no room at all; Aborted when the stream ends;
        without `wait`, HeldError where it would wait: it may be asked again, and gives way when the compute thread goes
        on.
        """
        size = payload_bytes + OVERHEAD_BYTES
        source = Source.of(key)
        bound = self._bounds.get(source) if answered else None
        with self._room:
            while (reason := self._reason_to_drop(key)) is None:
                if inflow.ended:
                    raise Aborted("A stream ended while it was held back", got=str(key))
                bounded = False
                if bound is not None and self._training and key.entry == self._front[0]:
                    self._check_bound(key, source, bound)
                    bounded = True
                if bounded or self._is_due(key):
                    self._check_limit(key, size)
                    break
                if self._has_credit(inflow, size):
                    break
                if not wait:
                    raise HeldError
                self._held += 1
                try:
                    self._room.wait()
                finally:
                    self._held -= 1
            else:
                self._on_drop(reason)
                return None
            self._bytes += size
            inflow.messages += 1
            inflow.size_bytes += size
            if bound is not None:
                self._untaken.setdefault((key.entry, source), set()).add(key.micro_batch)
        return Reservation(key, size, inflow)

    def fill(self, reservation: Reservation, content: Content) -> bool:
        """Keep the message that room was reserved for; return False if it was dropped after all."""
        key, size, inflow = reservation
        with self._room:
            reason = self._reason_to_drop(key)
            if reason is None:
                self._items[key] = (content, size, inflow)
                self._announce(key)
                return True
            self._give_back(size, inflow)
        self._on_drop(reason)
        return False

    def cancel(self, reservation: Reservation) -> None:
        """Give back the room of a message that will not come."""
        key, size, inflow = reservation
        with self._room:
            self._give_back(size, inflow)
            if key not in self._items:
                self._forget(key)

    def end(self, inflow: Inflow) -> None:
        """The stream has ended: it waits no more. Idempotent."""
        with self._room:
            inflow.ended = True
            self._streams.discard(inflow)
            self._room.notify_all()

    def put(self, key: Key, content: Content, payload_bytes: int = 0) -> bool:
        """Keep a message of this server itself; return False if it was dropped. LimitExceeded if it does not fit."""
        size = payload_bytes + OVERHEAD_BYTES
        with self._room:
            reason = self._reason_to_drop(key)
            if reason is None:
                self._check_limit(key, size)
                self._items[key] = (content, size, None)
                self._bytes += size
                self._announce(key)
                return True
        self._on_drop(reason)
        return False

    # --- the compute thread

    def begin(self, entry: int, micro_batch: int = 0, *, training: bool = False) -> None:
        """The compute thread begins a forward of a micro-batch, or an entry: what belongs to it is due."""
        with self._room:
            at = self._front[1] if self._front[0] == entry else 0
            self._front = (entry, max(at, micro_batch))
            self._training = training
            self._wake_streams()

    def holds(self, key: Key) -> bool:
        """Whether a message is here to be taken."""
        self._bell.look()
        with self._room:
            return key in self._items

    def poll(self, key: Key) -> Content | None:
        """Take a message if it is here; None if not. Raises what the mailbox was closed with."""
        with self._room:
            content = self._pop(key)
        if content is None:
            self._bell.look()
            with self._room:
                content = self._pop(key)
        return content

    def take(self, key: Key) -> Content:
        """Take a message, waiting for it as long as it takes. Raises what the mailbox was closed with."""
        with self._room:
            content = self._pop(key)
            if content is not None:
                return content
            self._taker = threading.get_ident()
            self._waiting = Waiting(key, time.monotonic())
            self._wake_streams()
        try:
            while content is None:
                self._bell.wait()
                with self._room:
                    content = self._pop(key)
        finally:
            self._waiting = None
        return content

    def finish(self, entry: int) -> None:
        """Forget what belongs to this entry and all before it; more of them is late from now on."""
        with self._room:
            self._finished = entry
            self._taken = {key for key in self._taken if not self._is_over(key)}
            self._untaken = {item: found for item, found in self._untaken.items() if item[0] > entry}
            for key in [key for key in self._items if key.entry <= entry and key.direction not in self._lasting]:
                _, size, inflow = self._items.pop(key)
                self._give_back(size, inflow)
            self._wake_streams()

    def close(self, reason: GradwireError) -> None:
        """Drop everything; every wait, now and later, ends with `reason`. The first reason stays."""
        with self._room:
            if self._closed is None:
                self._closed = reason
            for _, size, inflow in self._items.values():
                self._give_back(size, inflow)
            self._items.clear()
            self._taken.clear()
            self._untaken.clear()
            self._bell.ring()
            self._room.notify_all()

    # --- all with the lock

    def _announce(self, key: Key) -> None:
        if self._waiting is not None and self._waiting.key == key:
            self._waiting = None  # from now on its stream may be held back again
            if self._taker != threading.get_ident():
                self._bell.ring()

    def _wake_streams(self) -> None:
        if self._held:
            self._room.notify_all()

    def _pop(self, key: Key) -> Content | None:
        if self._closed is not None:
            raise self._closed
        item = self._items.pop(key, None)
        if item is None:
            return None
        content, size, inflow = item
        self._give_back(size, inflow)
        self._forget(key)
        self._taken.add(key)
        return content

    def _give_back(self, size: int, inflow: Inflow | None) -> None:
        self._bytes -= size
        if inflow is not None:
            inflow.messages -= 1
            inflow.size_bytes -= size
        self._wake_streams()

    def _forget(self, key: Key) -> None:
        untaken = self._untaken.get((key.entry, Source.of(key)))
        if untaken is not None:
            untaken.discard(key.micro_batch)

    def _reason_to_drop(self, key: Key) -> str | None:
        if self._closed is not None:
            return "released"
        if self._is_over(key):
            return "late"
        if key in self._items or key in self._taken:
            return "repeated"
        return None

    def _is_over(self, key: Key) -> bool:
        """Whether nobody will ask for a message any more."""
        if key.direction in self._lasting:
            return key.entry + _LASTING_ENTRIES <= self._finished
        return key.entry <= self._finished

    def _is_due(self, key: Key) -> bool:
        waiting = self._waiting
        if waiting is not None and self._stream_of(waiting.key) == self._stream_of(key):
            return True
        # All tensors of the state are of one micro-batch: those come as the compute thread asks for them.
        return key.direction not in _STATE and (key.entry, key.micro_batch) <= self._front

    def _has_credit(self, inflow: Inflow, size: int) -> bool:
        """Whether a message that is not due may come: half of the room is kept for those that are."""
        within = inflow.messages == 0 or inflow.size_bytes + size <= self._credit_bytes
        return within and self._bytes + size <= self._maximum_bytes // 2

    def _check_bound(self, key: Key, source: Source, bound: int) -> None:
        untaken = self._untaken.get((key.entry, source), ())
        if key.micro_batch not in untaken and len(untaken) >= bound:
            raise LimitExceeded(
                "A stage sends further ahead than the schedule allows",
                expected=f"{bound} untaken messages at most",
                got=f"one more: {key}",
                remedy="this is a fault of the sender: please report it",
            )

    def _check_limit(self, key: Key, size: int) -> None:
        if self._bytes + size > self._maximum_bytes:
            raise LimitExceeded(
                "The mailbox is full",
                expected=f"{self._maximum_bytes} bytes at most",
                got=f"{self._bytes} bytes, and {size} more for {key}",
                remedy="smaller micro-batches, or raise --mailbox-bytes on the stage server",
            )
