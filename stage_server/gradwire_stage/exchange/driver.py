"""Runs collectives on the compute thread: hands each the messages that it needs, as they come, and what else it needs.

Several are in progress side by side; none of them has a thread. Leaves to others: what a collective does
(`collectives.py`), and when there is time to go on (`step.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.collectives import Pending, Receive, Steps
from gradwire_stage.keys import Key
from gradwire_stage.peers import Incoming, Peers
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

T = TypeVar("T")
# Of a collective: a message, or what goes on by itself.
Need = Key | Pending


class Members:
    """Servers of a run, this one among them, as one collective sees them (`collectives.Group`)."""

    def __init__(self, peers: Peers, own: int, servers: Mapping[int, str], key: Callable[[int, str], Key]) -> None:
        """servers: by number, ascending. key: of what a member sends under the name of a round."""
        self.own = own
        self.members = tuple(servers)
        self.key = key
        self._peers = peers
        self._servers = servers

    def send(self, member: int, name: str, tensor: torch.Tensor) -> None:
        self._peers.send([self._servers[member]], self.key(self.own, name), tensor)


def replica_members(run: RunState, entry: int, name: str) -> Members:
    """Return the replicas of this server. name: of the collective, which no other of the entry has."""

    def key(replica: int, step: str) -> Key:
        return Key(entry, 0, f"{name}/{step}", pb.DIRECTION_REDUCE, run.first_stage, source_member=replica)

    return Members(run.peers, run.replica, run.places.replica_servers, key)


def run_to_end(run: RunState, timeline: Timeline[Any], members: Members, steps: Steps[T]) -> T:
    """Return the result of one collective, waiting for all that it needs. Otherwise the timeline stays in its phase."""
    try:
        wanted = next(steps)
        while True:
            phase = timeline.phase
            tensor = _take(run, timeline, _need(members, wanted))
            timeline.switch(phase)
            wanted = steps.send(tensor)
    except StopIteration as ended:
        result: T = ended.value
        return result


class _Open:
    """A collective in progress, and what it needs."""

    def __init__(self, members: Members, steps: Steps[Any], done: Callable[[Any], None]) -> None:
        self._members = members
        self._steps = steps
        self._done = done
        # None: it has ended.
        self.needs: Need | None = None
        self._go_on(None)

    def give(self, tensor: torch.Tensor) -> None:
        """Hand in what it needs."""
        self._go_on(tensor)

    def _go_on(self, tensor: torch.Tensor | None) -> None:
        try:
            wanted = next(self._steps) if tensor is None else self._steps.send(tensor)
        except StopIteration as ended:
            self.needs = None
            self._done(ended.value)
        else:
            self.needs = _need(self._members, wanted)


class Driver:
    """The collectives of one entry that are in progress between replicas.

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
        members = replica_members(self._run, self._entry, name)
        begun = _Open(members, collective(members), done)
        if begun.needs is not None:
            self._open[number] = begun

    def go_on(self) -> None:
        """Hand in what has come."""
        for number, collective in sorted(self._open.items()):
            while (need := collective.needs) is not None and (tensor := _poll(self._run, need)) is not None:
                collective.give(tensor)
            if collective.needs is None:
                del self._open[number]

    def wait(self) -> None:
        """Wait for what the lowest collective needs, and go on."""
        lowest = self._open[min(self._open)]
        if lowest.needs is not None:
            tensor = _take(self._run, self._timeline, lowest.needs)
            self._timeline.switch(phases.DECODE)
            lowest.give(tensor)
        self.go_on()

    def finish(self) -> None:
        """Wait until all have ended."""
        while self._open:
            self.wait()


def _need(members: Members, wanted: Receive | Pending) -> Need:
    return members.key(wanted.member, wanted.round) if isinstance(wanted, Receive) else wanted


def _poll(run: RunState, need: Need) -> torch.Tensor | None:
    """Return what is needed, if it is there."""
    if isinstance(need, Key):
        content = run.mailbox.poll(need)
        return None if content is None else _tensor(run, need, content)
    return need.result if need.is_done() else None


def _take(run: RunState, timeline: Timeline[Any], need: Need) -> torch.Tensor:
    """Return what is needed; wait for it, if need be in WAIT_EXCHANGE, in which the timeline then is."""
    run.check()
    tensor = _poll(run, need)
    if tensor is not None:
        return tensor
    timeline.switch(phases.WAIT_EXCHANGE)
    if isinstance(need, Key):
        return _tensor(run, need, run.mailbox.take(need))
    need.wait()
    return need.result


def _tensor(run: RunState, key: Key, content: Incoming) -> torch.Tensor:
    if not isinstance(content, tuple):
        raise FrameError(f"A message carries no tensor: {key}", expected="a tensor", got=repr(content))
    return run.device.claim(content[0])
