"""Runs collectives on the compute thread: hands each the messages that it needs, as they come.

Several are in progress side by side; none of them has a thread. Leaves to others: what a collective does
(`collectives.py`), and when there is time to go on (`step.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.collectives import Receive, Steps
from gradwire_stage.keys import Key
from gradwire_stage.peers import Incoming
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

T = TypeVar("T")


class Members:
    """The replicas of this server, as one collective of an entry sees them (`collectives.Group`)."""

    def __init__(self, run: RunState, entry: int, name: str) -> None:
        """name: of the collective, which no other of the entry has."""
        self.own = run.replica
        self.members = tuple(run.places.replica_servers)
        self._run = run
        self._entry = entry
        self._name = name

    def send(self, member: int, name: str, tensor: torch.Tensor) -> None:
        self._run.peers.send([self._run.places.replica_servers[member]], self.key(self.own, name), tensor)

    def key(self, member: int, name: str) -> Key:
        """Return the key of what a member sends under the name of a round."""
        value = f"{self._name}/{name}"
        return Key(self._entry, 0, value, pb.DIRECTION_REDUCE, self._run.first_stage, source_replica=member)


class _Open:
    """A collective in progress, and the message that it needs."""

    def __init__(self, members: Members, steps: Steps[Any], done: Callable[[Any], None]) -> None:
        self._members = members
        self._steps = steps
        self._done = done
        # None: it has ended.
        self.needs: Key | None = None
        self._go_on(None)

    def give(self, tensor: torch.Tensor) -> None:
        """Hand in what it needs."""
        self._go_on(tensor)

    def _go_on(self, tensor: torch.Tensor | None) -> None:
        try:
            wanted: Receive = next(self._steps) if tensor is None else self._steps.send(tensor)
        except StopIteration as ended:
            self.needs = None
            self._done(ended.value)
        else:
            self.needs = self._members.key(wanted.member, wanted.round)


class Driver:
    """The collectives of one entry that are in progress.

    Each has a number, the same at all members. Whoever waits, waits for the lowest that has not ended here: of those
    that have not ended everywhere the lowest is then waited for by all who have begun it, and goes on, so that no
    circle of waits can form.
    """

    def __init__(self, run: RunState, timeline: Timeline[Any], entry: int) -> None:
        self._run = run
        self._timeline = timeline
        self._entry = entry
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        """Number of collectives that have not ended."""
        return len(self._open)

    def begin(
        self, number: int, name: str, collective: Callable[[Members], Steps[T]], done: Callable[[T], None]
    ) -> None:
        """Begin a collective, under a number and a name that no other of the entry has; `done` gets its result."""
        members = Members(self._run, self._entry, name)
        begun = _Open(members, collective(members), done)
        if begun.needs is not None:
            self._open[number] = begun

    def go_on(self) -> None:
        """Hand in what has come."""
        for number, collective in sorted(self._open.items()):
            while (key := collective.needs) is not None and (content := self._run.mailbox.poll(key)) is not None:
                collective.give(self._tensor(key, content))
            if collective.needs is None:
                del self._open[number]

    def wait(self) -> None:
        """Wait for the message that the lowest collective needs, and go on."""
        lowest = self._open[min(self._open)]
        if lowest.needs is not None:
            self._run.check()
            content = self._run.mailbox.poll(lowest.needs)
            if content is None:
                self._timeline.switch(phases.WAIT_EXCHANGE)
                content = self._run.mailbox.take(lowest.needs)
            self._timeline.switch(phases.DECODE)
            lowest.give(self._tensor(lowest.needs, content))
        self.go_on()

    def finish(self) -> None:
        """Wait until all have ended."""
        while self._open:
            self.wait()

    def _tensor(self, key: Key, content: Incoming) -> torch.Tensor:
        if not isinstance(content, tuple):
            raise FrameError(f"A message carries no tensor: {key}", expected="a tensor", got=repr(content))
        return self._run.device.claim(content[0])
