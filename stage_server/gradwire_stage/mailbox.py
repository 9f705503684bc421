"""Where messages for a run wait until the compute thread takes them, whatever order they came in.

gRPC threads put, one compute thread takes. Repeated and late messages are counted and dropped; what a message holds,
and whether it belongs to this run at all, is decided outside.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from gradwire_protocol.errors import GradwireError, LimitExceeded
from gradwire_protocol.v1 import tensors_pb2 as pb

Content = TypeVar("Content")

# What a message costs besides its payload: key, header, Python objects. Bounds the number of empty messages.
OVERHEAD_BYTES = 1024


class Key(NamedTuple):
    """A MessageKey without run and generation, which are the same for everything in one mailbox."""

    entry: int
    micro_batch: int
    value: str
    direction: pb.Direction
    source_stage: int
    # Of a value of the optimizer's state for the parameter `value`; otherwise empty.
    state: str = ""

    def __str__(self) -> str:
        stage = f"from stage {self.source_stage}"
        match self.direction:
            case pb.DIRECTION_BATCH:
                return f"rows of micro-batch {self.micro_batch} (input {self.value!r}) from the client"
            case pb.DIRECTION_FORWARD:
                return f"forward of micro-batch {self.micro_batch} (value {self.value!r}) {stage}"
            case pb.DIRECTION_BACKWARD:
                return f"backward of micro-batch {self.micro_batch} (gradient of {self.value!r}) {stage}"
            case pb.DIRECTION_STATE if self.state:
                return f"the optimizer's {self.state!r} of {self.value!r} from the client"
            case pb.DIRECTION_STATE:
                return f"tensor {self.value!r} from the client"
            case pb.DIRECTION_TIED:
                return f"gradient of the tied tensor {self.value!r} {stage}"
            case pb.DIRECTION_NORM:
                return f"sum of squared gradients {stage}"
            case pb.DIRECTION_WEIGHT:
                return f"total weight of the loss {stage}"
        return f"{self.value!r} {stage}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the compute thread waits for, and since when (time.monotonic)."""

    key: Key
    since: float


class Mailbox(Generic[Content]):
    """Messages by key, within a limit on their total size. Thread-safe.

    `on_drop` gets the reason of every dropped message: "repeated", "late" or "released".
    """

    def __init__(self, maximum_bytes: int, on_drop: Callable[[str], None]) -> None:
        self._maximum_bytes = maximum_bytes
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._items: dict[Key, tuple[Content, int]] = {}
        self._taken: set[Key] = set()  # of entries that are not finished
        self._finished = 0  # the last finished entry
        self._bytes = 0
        self._closed: GradwireError | None = None
        self._waiting: Waiting | None = None

    @property
    def size_bytes(self) -> int:
        return self._bytes

    @property
    def waiting(self) -> Waiting | None:
        return self._waiting

    def put(self, key: Key, content: Content, payload_bytes: int = 0) -> bool:
        """Keep a message; return False if it was dropped. LimitExceeded if it does not fit."""
        size = payload_bytes + OVERHEAD_BYTES
        with self._changed:
            reason = self._reason_to_drop(key)
            if reason is None:
                self._check_limit(key, size)
                self._items[key] = (content, size)
                self._bytes += size
                if self._waiting is not None and self._waiting.key == key:
                    self._changed.notify()
                return True
        self._on_drop(reason)
        return False

    def poll(self, key: Key) -> Content | None:
        """Take a message if it is here; None if not. Raises what the mailbox was closed with."""
        with self._changed:
            return self._pop(key)

    def take(self, key: Key) -> Content:
        """Take a message, waiting for it as long as it takes. Raises what the mailbox was closed with."""
        with self._changed:
            content = self._pop(key)
            if content is not None:
                return content
            self._waiting = Waiting(key, time.monotonic())
            try:
                while (content := self._pop(key)) is None:
                    self._changed.wait()
            finally:
                self._waiting = None
            return content

    def finish(self, entry: int) -> None:
        """Forget what belongs to this entry and all before it; more of them is late from now on."""
        with self._changed:
            self._finished = entry
            self._taken = {key for key in self._taken if key.entry > entry}
            for key in [key for key in self._items if key.entry <= entry]:
                self._bytes -= self._items.pop(key)[1]

    def close(self, reason: GradwireError) -> None:
        """Drop everything; every wait, now and later, ends with `reason`. The first reason stays."""
        with self._changed:
            if self._closed is None:
                self._closed = reason
            self._items.clear()
            self._taken.clear()
            self._bytes = 0
            self._changed.notify_all()

    def _pop(self, key: Key) -> Content | None:
        if self._closed is not None:
            raise self._closed
        item = self._items.pop(key, None)
        if item is None:
            return None
        content, size = item
        self._bytes -= size
        self._taken.add(key)
        return content

    def _reason_to_drop(self, key: Key) -> str | None:
        if self._closed is not None:
            return "released"
        if key.entry <= self._finished:
            return "late"
        if key in self._items or key in self._taken:
            return "repeated"
        return None

    def _check_limit(self, key: Key, size: int) -> None:
        if self._bytes + size > self._maximum_bytes:
            raise LimitExceeded(
                "The mailbox is full",
                expected=f"{self._maximum_bytes} bytes at most",
                got=f"{self._bytes} bytes, and {size} more for {key}",
                remedy="smaller micro-batches or a smaller window, or raise --mailbox-bytes on the stage server",
            )
