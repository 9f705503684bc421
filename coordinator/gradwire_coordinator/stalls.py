"""Finds what a run hangs on: who owes what is waited for, and has made no progress for too long.

Pure: what is known of the servers goes in, an error comes out. Leaves to others: gathering (`run.py`, `registry.py`),
and when to look (`service.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradwire_coordinator.server_place import ServerPlace
from gradwire_protocol.activities import activity_words, doing_words, is_between_entries, wait_words
from gradwire_protocol.errors import Stalled
from gradwire_protocol.v1 import run_pb2, stage_pb2

DEFAULT_STALL_SECONDS = 60.0
_SHOWN_WAITS = 4
_WITH_BATCH = ("train_step", "evaluate", "predict")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One server of a run, as its coordinator knows it."""

    # In the run's lists.
    position: int
    place: ServerPlace
    server: str
    address: str
    # Of this run, as of the last heartbeat; None: it has told nothing of this run.
    activity: stage_pb2.Activity | None
    # Number of the oldest open entry that it has not reported, and how long ago that was dispatched; 0: it owes none.
    owes: int
    owed_seconds: float
    # Since its last heartbeat.
    silent_seconds: float
    # From its last progress, and its client's last progress with it, to its last heartbeat: not to now, so that
    # heartbeats which come late look like no stall.
    still_seconds: float
    client_still_seconds: float

    def stands_still(self) -> float:
        """Return for how long it has made no progress with what it owes, as far as that is known."""
        still = self.still_seconds
        if self.owes:
            still = min(still, self.owed_seconds - self.silent_seconds)
        # One that is silent for longer than anything is allowed to take is not only late.
        return max(still, min(self.silent_seconds, self.owed_seconds) if self.owes else self.silent_seconds)

    @property
    def where(self) -> str:
        return f"{self.name.capitalize()} (server {self.server} at {self.address})"

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def heard(self) -> str:
        return f"last heard of {self.silent_seconds:.1f} s ago"

    @property
    def wait(self) -> stage_pb2.Wait | None:
        activity = self.activity
        return activity.wait if activity is not None and activity.HasField("wait") else None

    @property
    def words(self) -> str:
        return f"{self.name} " + ("holds no such run" if self.activity is None else activity_words(self.activity))


def find_stall(servers: Sequence[Standing], *, client_seconds: float, limit_seconds: float) -> Stalled | None:
    """Return the error of a run that stands still, None if it moves or has nothing to do.

    client_seconds: since the client did something that the coordinator itself saw. A server that owes an entry and
    stands still is followed along its waits to the one who owes the missing thing in the end: a server, the client, or
    nobody, where the waits form a circle or the message was lost. As long as anyone on the way moves, it is no stall.
    """
    by_name = {server.server: server for server in servers}
    client_still = min([client_seconds, *(server.client_still_seconds for server in servers)])
    owing = [server for server in servers if server.owes]
    for start in sorted(owing, key=lambda server: (server.owes, server.position)):
        path = _path(start, by_name, limit_seconds)
        if not path:
            continue
        root = path[-1]
        wait = root.wait
        if root.silent_seconds >= limit_seconds or wait is None or (wait.server and wait.server not in by_name):
            return _stands_still(path, limit_seconds)
        if wait.kind == stage_pb2.WAIT_KIND_DISK:
            return _disk(root, limit_seconds)
        if wait.server:
            return _circle(path, by_name[wait.server], limit_seconds)
        if client_still >= limit_seconds:
            return _client(root, wait, limit_seconds)
    return None


def find_late(
    oldest: tuple[run_pb2.Entry, float] | None, servers: Sequence[Standing], step_seconds: float
) -> Stalled | None:
    """Return the error of a run whose oldest open entry takes longer than a step may; step_seconds 0: None."""
    if oldest is None or not step_seconds:
        return None
    entry, seconds = oldest
    kind = entry.WhichOneof("kind")
    if kind not in _WITH_BATCH or seconds <= step_seconds:
        return None
    what = f"Step {entry.train_step.step}" if kind == "train_step" else f"Entry {entry.number} ({kind})"
    return Stalled(
        f"{what} has taken {seconds:.1f} s",
        expected=f"{step_seconds:g} s at most, the plan's step_seconds",
        got="; ".join(server.words for server in servers[:_SHOWN_WAITS]),
        remedy="find the slow stage with gradwire status, or raise step_seconds",
    )


def _path(start: Standing, by_name: Mapping[str, Standing], limit_seconds: float) -> list[Standing]:
    """Follow the waits from a server to where they end or close; empty if anyone on the way moves."""
    path: list[Standing] = []
    at: Standing | None = start
    while at is not None and at not in path:
        if at.stands_still() < limit_seconds:
            return []
        path.append(at)
        if at.silent_seconds >= limit_seconds or at.wait is None:
            break
        at = by_name.get(at.wait.server)
    return path


def _stands_still(path: Sequence[Standing], limit_seconds: float) -> Stalled:
    """The waits end at a server that waits for nobody."""
    root = path[-1]
    seconds = root.stands_still()
    activity = root.activity
    waits = _waits(path[:-1])
    expected = f"progress within {limit_seconds:g} s, the plan's stall_seconds"
    if root.silent_seconds >= limit_seconds:
        return Stalled(
            f"{root.where} has not been heard of for {root.silent_seconds:.1f} s",
            expected=expected,
            got=_joined(f"when last heard of, {root.words}", waits),
            remedy="see whether its process is stopped or its machine is overloaded",
        )
    if activity is None or not is_between_entries(activity):
        doing = "without a sign of the run" if activity is None else doing_words(activity)
        return Stalled(
            f"{root.where} has made no progress for {seconds:.1f} s: it is {doing}",
            expected=expected,
            got=_joined(waits, root.heard),
            remedy="if one action may take this long here, raise stall_seconds in the plan or use more micro-batches; "
            "otherwise see this server's log",
        )
    if root.owes > activity.entry:
        return Stalled(
            f"{root.where} has not begun entry {root.owes}, sent to it {root.owed_seconds:.1f} s ago",
            expected=expected,
            got=_joined(waits, f"it is {doing_words(activity)}", root.heard),
            remedy="check the network between the coordinator and this server",
        )
    if root.owes:
        return Stalled(
            f"{root.where} has finished entry {root.owes}, but its report has not come for {seconds:.1f} s",
            expected=expected,
            got=_joined(waits, root.heard),
            remedy="check the network between this server and the coordinator",
        )
    return _lost(path[-2], root, waits, limit_seconds)


def _lost(waiting: Standing, owner: Standing, waits: str, limit_seconds: float) -> Stalled:
    """A server waits for something from one that has done all it was given."""
    wait, activity = waiting.wait, owner.activity
    on_the_way = "nothing is on its way"
    if activity is not None:
        for item in activity.unreceipted:
            if item.server == waiting.server:
                on_the_way = f"{item.messages} messages of {item.size_bytes} bytes are sent and not received"
    missing = "something" if wait is None else wait_words(wait, 0)
    return Stalled(
        f"{waiting.where} has waited {waiting.stands_still():.1f} s for {missing}, which has finished its part",
        expected=f"the message within {limit_seconds:g} s, the plan's stall_seconds, while nothing moves",
        got=_joined(waits, f"{owner.name}: {on_the_way}"),
        remedy=f"check the network between {owner.name} at {owner.address} and {waiting.name} at {waiting.address}",
    )


def _circle(path: Sequence[Standing], closing: Standing, limit_seconds: float) -> Stalled:
    """The waits close at one that is on the way already: something was lost between two of them."""
    circle = path[path.index(closing) :] if closing in path else path
    seconds = min(server.stands_still() for server in circle)
    return Stalled(
        f"{_names(circle)} have waited for each other for {seconds:.1f} s: a message between them was lost",
        expected=f"progress within {limit_seconds:g} s, the plan's stall_seconds",
        got=_waits(circle),
        remedy="check the network between " + " and ".join(f"{s.name} at {s.address}" for s in circle),
    )


def _disk(waiting: Standing, limit_seconds: float) -> Stalled:
    """A server waits for its own disk: nothing of a checkpoint gets written, and the next one is due."""
    return Stalled(
        f"{waiting.where} has waited {waiting.stands_still():.1f} s for a checkpoint to be written to disk",
        expected=f"progress within {limit_seconds:g} s, the plan's stall_seconds",
        got=waiting.heard,
        remedy="see whether the file system of its --checkpoint-root answers",
    )


def _client(waiting: Standing, wait: stage_pb2.Wait, limit_seconds: float) -> Stalled:
    activity = waiting.activity
    entry = 0 if activity is None else activity.entry
    return Stalled(
        f"The client has made no progress for {waiting.stands_still():.1f} s: {waiting.where} waits for "
        f"{wait_words(wait, entry)}",
        expected=f"what the client owes to entry {entry} within {limit_seconds:g} s, the plan's stall_seconds",
        got=_joined(waiting.words, waiting.heard),
        remedy="see whether the client is stopped, or its network to this server is broken; raise stall_seconds if it "
        "may take this long",
    )


def _names(circle: Sequence[Standing]) -> str:
    """Return "Stages 0, 1, 2", or "Stages 0, 3 and 1, 2"; of several replicas or shards each server by its name."""
    places = [server.place for server in circle]
    if any(place.replicas > 1 or place.shards > 1 for place in places):
        return " and ".join(place.name for place in places).capitalize()
    several = any(len(place.stages) > 1 for place in places)
    return "Stages " + (" and " if several else ", ").join(", ".join(map(str, place.stages)) for place in places)


def _waits(path: Sequence[Standing]) -> str:
    words = [server.words for server in path[:_SHOWN_WAITS]]
    more = len(path) - len(words)
    return "; ".join(words + ([f"and {more} more"] if more > 0 else []))


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))
