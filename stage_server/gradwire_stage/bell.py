"""What the compute thread waits at for messages."""

from __future__ import annotations

import threading
from typing import Protocol


class Bell(Protocol):
    """Rung by whoever brings a message that the compute thread waits for."""

    def ring(self) -> None:
        """End the wait, or the next one. Any thread."""

    def look(self) -> None:
        """Take in what has come already. For the compute thread, as `wait` is."""

    def wait(self) -> None:
        """Wait until it is rung; may also return before that, when something has come."""


class PlainBell:
    """A bell where nothing but other threads brings messages."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def ring(self) -> None:
        self._rung.set()

    def look(self) -> None:
        """Other threads have put it into the mailbox."""

    def wait(self) -> None:
        self._rung.wait()
        self._rung.clear()
