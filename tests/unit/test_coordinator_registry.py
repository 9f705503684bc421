"""The registry, under a clock that the test moves."""

from __future__ import annotations

import pytest

from gradwire_coordinator.registry import Registry, describe
from gradwire_protocol.errors import PlanError, RunNotFound, SettingsError
from gradwire_protocol.v1 import coordinator_pb2, stage_pb2


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(name: str = "a", **changes: object) -> coordinator_pb2.RegisterRequest:
    fields = {"server": name, "role": coordinator_pb2.SERVER_ROLE_STAGE, "address": "127.0.0.1:7000", **changes}
    return coordinator_pb2.RegisterRequest(**fields)  # type: ignore[arg-type]


def make(*names: str) -> tuple[Registry, Clock]:
    clock = Clock()
    registry = Registry(lease_seconds=10, heartbeat_seconds=2, clock=clock)
    for name in names:
        registry.register(request(name))
    return registry, clock


def test_registration_tells_the_terms() -> None:
    registry, _ = make()
    reply, replaced = registry.register(request("a"))
    assert (reply.lease_seconds, reply.heartbeat_seconds, replaced) == (10, 2, None)


def test_a_lease_lasts_while_heartbeats_come() -> None:
    registry, clock = make("a", "b")
    for _ in range(5):
        clock.now += 9
        registry.heartbeat("a", stage_pb2.Activity())
        lost = [server.server for server in registry.expire()]
    assert lost == []
    assert [server.server for server in registry.servers()] == ["a"]
    with pytest.raises(RunNotFound, match="not registered") as caught:
        registry.heartbeat("b", stage_pb2.Activity())
    assert "register again" in caught.value.remedy


def test_what_expires_says_which_run_it_had() -> None:
    registry, clock = make("a")
    registry.reserve("run", 1)
    clock.now += 10.5
    assert [(server.server, server.run) for server in registry.expire()] == [("a", "run")]
    assert registry.expire() == []


def test_the_same_identifier_replaces() -> None:
    registry, _ = make("a")
    registry.reserve("run", 1)
    _, replaced = registry.register(request("a", address="127.0.0.1:7001"))
    assert replaced is not None
    assert replaced.run == "run"
    (server,) = registry.servers()
    assert (server.address, server.run) == ("127.0.0.1:7001", "")


def test_servers_are_reserved_in_the_order_of_registration() -> None:
    registry, _ = make("c", "a", "b")
    assert [server.server for server in registry.reserve("one", 2)] == ["c", "a"]
    with pytest.raises(PlanError) as caught:
        registry.reserve("two", 2)
    assert caught.value.message == "The plan takes 2 servers, but 1 stage servers are free"
    assert caught.value.got == "3 registered, 2 of them busy with other runs"
    registry.release("one")
    assert [server.server for server in registry.reserve("two", 3)] == ["c", "a", "b"]


def test_no_run_gets_a_server_that_leaves() -> None:
    """It may be free for a moment before it has gone."""
    registry, _ = make("a", "b")
    assert registry.heartbeat("a", stage_pb2.Activity(), leaving=True).leaving
    # Once said is said.
    assert registry.heartbeat("a", stage_pb2.Activity()).leaving
    assert [server.server for server in registry.reserve("one", 1)] == ["b"]
    with pytest.raises(PlanError):
        registry.reserve("two", 1)
    # Started again, it is another.
    registry.register(request("a"))
    assert [server.server for server in registry.reserve("two", 1)] == ["a"]


def test_parameter_servers_host_no_stage() -> None:
    registry, _ = make()
    registry.register(request("p", role=coordinator_pb2.SERVER_ROLE_PARAMETER))
    with pytest.raises(PlanError):
        registry.reserve("run", 1)


def test_activity_is_described_in_words() -> None:
    registry, clock = make("a")
    assert registry.last_known("a") == "0.0 s ago: idle"
    activity = stage_pb2.Activity(run="r", entry=7, action="1F3", waiting_for="n3", waiting_seconds=0.4)
    registry.heartbeat("a", activity)
    clock.now += 1.25
    assert registry.last_known("a") == "1.2 s ago: entry 7, action 1F3, waiting for n3 since 0.4 s"
    assert registry.last_known("nobody") == "not registered any more"
    assert describe(stage_pb2.Activity(run="r", entry=3), 2) == "2.0 s ago: entry 3"


@pytest.mark.parametrize(
    "bad",
    [
        {"server": ""},
        {"server": "x" * 65},
        {"server": "a b"},
        {"server": "../a"},
        {"role": coordinator_pb2.SERVER_ROLE_UNSPECIFIED},
        {"address": ""},
        {"address": "no port"},
        {"address": "127.0.0.1:0"},
        {"metrics_address": "x:y"},
    ],
)
def test_registrations_that_cannot_be_are_refused(bad: dict[str, object]) -> None:
    registry, _ = make()
    with pytest.raises(SettingsError):
        registry.register(request(**bad))
    assert registry.servers() == []


def test_leaving_is_idempotent() -> None:
    registry, _ = make("a")
    assert registry.deregister("a") is not None
    assert registry.deregister("a") is None


def test_time_in_which_nothing_could_be_heard_does_not_count() -> None:
    registry, clock = make("a")
    clock.now += 25
    registry.forgive(16)
    assert registry.expire() == []
    registry.forgive(1000)  # never into the future
    clock.now += 10.5
    assert [server.server for server in registry.expire()] == ["a"]


def test_a_server_stands_still_from_its_last_progress_to_its_last_heartbeat() -> None:
    registry, clock = make("a")

    def beat(progress: int, client_progress: int = 0, run: str = "r") -> tuple[float, float, float]:
        activity = stage_pb2.Activity(run=run, generation=1, progress=progress, client_progress=client_progress)
        registry.heartbeat("a", activity)
        clock.now += 1
        known = registry.standing("a")
        assert known is not None
        return known.silent_seconds, known.still_seconds, known.client_still_seconds

    assert beat(1) == (1, 0, 0)
    assert beat(1) == (1, 1, 1)
    assert beat(2) == (1, 0, 2)
    assert beat(2) == (1, 1, 3)
    assert beat(3, 1) == (1, 0, 0)
    clock.now += 5
    known = registry.standing("a")
    assert known is not None
    # Late heartbeats are silence, not standing still.
    assert (known.silent_seconds, known.still_seconds) == (6, 0)
    assert beat(3, 1) == (1, 6, 6)
    # Time in which no heartbeat could be heard proves nothing.
    clock.now += 8
    registry.forgive(8)
    assert beat(3, 1) == (1, 7, 7)
    # Another run begins from nothing.
    assert beat(3, 1, "s") == (1, 0, 0)
    assert registry.standing("b") is None
