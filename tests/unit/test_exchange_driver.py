"""Collectives go on with messages, and with what goes on by itself: polled in passing, and waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradwire_stage import timeline as phases
from gradwire_stage.exchange.collectives import Group, Receive, Steps
from gradwire_stage.exchange.driver import Driver, run_to_end
from gradwire_stage.timeline import HostClock, Timeline


class Sum:
    """Something that goes on by itself."""

    def __init__(self, value: float) -> None:
        self.result = torch.tensor(value)
        self.done = False
        self.waits = 0

    def is_done(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.waits += 1
        self.done = True


class Box(dict[Any, Any]):
    """A mailbox that has all that it will ever have."""

    def poll(self, key: Any) -> Any:
        return self.pop(key.value, None)

    take = poll


def make_driver() -> tuple[Driver, Any]:
    run = SimpleNamespace(
        mailbox=Box(),
        check=lambda: None,
        peers=None,
        replica=0,
        first_stage=0,
        places=SimpleNamespace(replica_servers={0: "a", 1: "b"}),
        device=SimpleNamespace(claim=lambda tensor: tensor),
    )
    return Driver(run, Timeline(HostClock()), 1), run  # type: ignore[arg-type]


def adding(*sums: Sum, message: bool = False) -> Any:
    def steps(group: Group) -> Steps[float]:
        total = 0.0
        for each in sums:
            total += float((yield each))
        if message:
            total += float((yield Receive(1, "m")))
        return total

    return steps


def test_what_has_ended_goes_on_in_passing() -> None:
    driver, run = make_driver()
    found: list[float] = []
    first, second, third = Sum(1), Sum(2), Sum(3)
    driver.begin(0, "a", adding(first, second), found.append)
    driver.begin(1, "b", adding(third, message=True), found.append)
    driver.go_on()
    assert (found, len(driver)) == ([], 2)
    third.done = True
    run.mailbox["b/m"] = (torch.tensor(10.0), False)
    driver.go_on()
    assert (found, len(driver)) == ([13.0], 1)
    first.done = second.done = True
    driver.go_on()
    assert (found, len(driver)) == ([13.0, 3.0], 0)
    assert not first.waits + second.waits + third.waits


def test_the_lowest_is_waited_for() -> None:
    driver, _ = make_driver()
    found: list[float] = []
    sums = [Sum(number) for number in range(3)]
    for number, each in reversed(list(enumerate(sums))):
        driver.begin(number, str(number), adding(each), found.append)
    driver.wait()
    assert found == [0.0]
    assert [each.waits for each in sums] == [1, 0, 0]
    driver.finish()
    assert found == [0.0, 1.0, 2.0]


def test_what_fails_is_raised_by_whoever_looks() -> None:
    driver, _ = make_driver()
    broken = Sum(1)
    driver.begin(0, "a", adding(broken), lambda _: None)

    def is_done() -> bool:
        raise RuntimeError("a connection broke")

    broken.is_done = is_done  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broke"):
        driver.go_on()


def test_one_that_runs_to_its_end_waits_in_its_own_phase() -> None:
    _, run = make_driver()
    timeline = Timeline(HostClock(), phases.FORWARD)
    seen: list[str] = []
    one = Sum(4)
    one.wait = lambda: seen.append(timeline.phase)  # type: ignore[method-assign]
    assert run_to_end(run, timeline, None, adding(one)(None)) == 4.0  # type: ignore[arg-type]
    assert (seen, timeline.phase) == ([phases.WAIT_EXCHANGE], phases.FORWARD)
