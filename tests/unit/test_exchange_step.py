"""When the buckets of a step start: as soon as no action adds to their gradients any more, and in one order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradwire_protocol.program import parse_program
from gradwire_protocol.v1 import run_pb2
from gradwire_stage.exchange.buckets import Bucket
from gradwire_stage.exchange.step import StepExchange
from gradwire_stage.timeline import HostClock, Timeline


class Started:
    """Stands in for the driver: notes which collectives begin, and ends none."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def begin(self, number: int, name: str, start: Callable[..., Any], done: Callable[..., Any]) -> None:
        self.numbers.append(number)

    def go_on(self) -> None:
        pass

    def __len__(self) -> int:
        return 0


def step_of(program: str, buckets: Sequence[tuple[Sequence[str], Sequence[int]]]) -> tuple[StepExchange, list[int]]:
    """Return the exchange of a step, and the buckets, of (names, stages), that it has started."""
    names = [name for bucket, _ in buckets for name in bucket]
    parameters = {name: nn.Parameter(torch.zeros(2)) for name in names}
    run = SimpleNamespace(parameters=parameters, metrics=SimpleNamespace(exchanged=lambda size: None))
    made = [
        Bucket(tuple(bucket), (torch.Size([2]),) * len(bucket), torch.float32, frozenset(stages))
        for bucket, stages in buckets
    ]
    exchange = StepExchange(
        *(run, Timeline(HostClock()), made, [None] * len(made), None),  # type: ignore[arg-type, list-item]
        entry=1,
        step=run_pb2.TrainStep(step=1),
        program=parse_program(program),
    )
    started = Started()
    exchange._driver = started  # type: ignore[assignment]
    return exchange, started.numbers


def do(exchange: StepExchange, action: str, inside: Callable[[], None] = lambda: None) -> None:
    (parsed,) = parse_program(action)
    exchange.before(parsed)
    inside()
    exchange.after(parsed)


@pytest.mark.parametrize("kind", ["B", "W"])
def test_a_bucket_starts_inside_the_last_action_that_adds_to_it(kind: str) -> None:
    program = "0F0 0F1 0I0 0I1 0W0 0W1" if kind == "W" else "0F0 0F1 0B0 0B1"
    exchange, started = step_of(program, [(["d", "c"], [0]), (["b", "a"], [0])])
    do(exchange, f"0{kind}0", lambda: [exchange.accumulated(0, name) for name in "dc"])  # type: ignore[func-returns-value]
    assert started == []

    def last() -> None:
        exchange.accumulated(0, "d")
        assert started == []
        exchange.accumulated(0, "c")
        assert started == [0]
        exchange.accumulated(1, "a")

    do(exchange, f"0{kind}1", last)
    assert started == [0, 1]


def test_what_the_weights_part_does_not_add_to_is_whole_when_it_begins() -> None:
    """Norms and embeddings have their gradients from the first part of a split backward."""
    exchange, started = step_of("0F0 0I0 0W0", [(["norm"], [0]), (["weight", "bias", "embedding"], [0])])

    def weights() -> None:
        exchange.only({"weight", "bias"})
        assert started == [0]
        exchange.accumulated(1, "bias")
        assert started == [0]
        exchange.accumulated(1, "weight")
        assert started == [0, 1]

    do(exchange, "0W0", weights)


def test_earlier_parts_tell_nothing() -> None:
    exchange, started = step_of("0F0 0F1 0I0 0W0 0I1 0W1", [(["norm"], [0]), (["weight"], [0])])
    do(exchange, "0W0", lambda: exchange.only({"weight"}))
    assert started == []


def test_a_bucket_of_two_stages_waits_for_both() -> None:
    exchange, started = step_of("0F0 1F0 1B0 0B0", [(["b", "a"], [0, 1]), (["c"], [1])])
    do(exchange, "1B0", lambda: exchange.accumulated(1, "c"))
    assert started == []  # in order: the second is ready, the first is not

    def last() -> None:
        exchange.accumulated(0, "a")
        assert started == []
        exchange.accumulated(0, "b")
        assert started == [0, 1]

    do(exchange, "0B0", last)
