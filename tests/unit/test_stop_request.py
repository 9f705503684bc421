"""Until when a client may take to end a run whose services were asked to stop."""

from __future__ import annotations

from gradwire_coordinator.stop_request import StopState


def test_the_client_is_told_once_and_has_most_of_the_time() -> None:
    state = StopState()
    assert state.overdue(1e9) == ""
    request = state.ask("server a was asked to stop", 30.0, now=100.0)
    assert request is not None
    assert (request.reason, request.seconds) == ("server a was asked to stop", 25.0)
    assert state.ask("server a was asked to stop", 29.0, now=101.0) is None
    assert state.overdue(124.9) == ""
    assert state.overdue(125.0) == "server a was asked to stop, and its client has not ended it in time"


def test_the_earliest_deadline_counts_and_the_first_reason() -> None:
    state = StopState()
    state.ask("first", 30.0, now=0.0)
    state.ask("second", 4.0, now=1.0)
    assert state.overdue(2.9) == ""
    assert state.overdue(3.0).startswith("first")
