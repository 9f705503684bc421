"""What a plan asks of the partition: live micro-batches, tied tensors, links, and what may fit instead."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from graph_text import chain_model, plan

from gradwire_coordinator.boundaries import Links
from gradwire_coordinator.costs import MEASURED, NodeCosts
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.model_checks import check_model
from gradwire_coordinator.optimizer_costs import OptimizerCosts
from gradwire_coordinator.partition_inputs import PartitionInputs, live_micro_batches
from gradwire_coordinator.placement import looped, v_shaped
from gradwire_coordinator.programs import ChosenSchedule
from gradwire_coordinator.tensor.sharded_model import shard_model
from gradwire_protocol.errors import Unreachable
from gradwire_protocol.v1 import run_pb2

NODES = 12


def inputs(servers: int, *, links: Links | None = None, memory: int = 0, **changes: Any) -> PartitionInputs:
    """A chain of nodes with a parameter each; each takes 1 ms and keeps 100 bytes of two rows."""
    optimizer = run_pb2.Optimizer(name="Adam")
    optimizer.groups.add(parameters=[f"W{i}" for i in range(NODES)])
    each = np.full(NODES + 1, 1e-3)
    costs = NodeCosts(2, each, each, each, np.full(NODES + 1, 100), MEASURED)
    asked = plan(servers, **{"virtual_stages": 1, **changes})
    return PartitionInputs(
        plan=asked,
        optimizer=OptimizerCosts(optimizer),
        sharded=shard_model(check_model(chain_model(NODES)), asked),
        costs=[costs] * servers,
        memory_bytes=[memory] * servers,
        links=links or {},
    )


@pytest.mark.parametrize(
    ("schedule", "placement", "live"),
    [
        ("1f1b", looped(4), [4, 3, 2, 1]),
        ("gpipe", looped(3), [8, 8, 8]),
        ("zb-h1", looped(4), [4, 3, 2, 1]),
        ("zb-v", v_shaped(2), [3, 2, 2, 1]),
    ],
)
def test_live_micro_batches_are_those_of_the_programs(
    schedule: str, placement: tuple[int, ...], live: list[int]
) -> None:
    assert live_micro_batches(ChosenSchedule(schedule, placement).programs(8), placement) == live


def test_a_problem_has_what_the_plan_says() -> None:
    asked = inputs(3, schedule="1f1b", micro_batches=4, expected_rows=8, recompute=True, memory=10**6)
    problem = asked.problem(looped(3))
    assert problem.seconds.shape == (3, NODES + 1)
    assert problem.live == [3, 2, 1]
    # The last stage has its backward right behind the forward.
    assert problem.recomputes == [True, True, False]
    assert list(problem.memory_bytes) == [10**6] * 3
    assert len(problem.tensors) == NODES
    for tensor in problem.tensors:
        assert tensor.gradient_bytes == tensor.weight_bytes
        assert tensor.optimizer_bytes == 2 * tensor.weight_bytes
    assert problem.inputs


def test_auto_is_taken_to_warm_up_as_little_as_1f1b() -> None:
    assert inputs(3, schedule="auto", micro_batches=8, expected_rows=8).problem(looped(3)).live == [3, 2, 1]


def test_noise_of_measurements_makes_no_difference_between_links() -> None:
    near = {(0, 1): LinkRate(1e8, 1.5e8, 1e-3), (1, 2): LinkRate(1.4e8, 1.2e8, 1e-3)}
    problem = inputs(3, links=near).problem(looped(3))
    assert problem.links_are_alike
    assert problem.link(0, 2)[0] == pytest.approx(1.3e8)
    assert inputs(3).problem(looped(3)).links_are_alike


def test_a_link_that_was_not_measured_counts_as_slow() -> None:
    unlike: Links = {(0, 1): LinkRate(1e9, 1e8, 1e-3), (1, 2): Unreachable("no route")}
    problem = inputs(3, links=unlike).problem(looped(3))
    assert not problem.links_are_alike
    assert [problem.link(*ends)[0] for ends in ((0, 1), (1, 0), (0, 2), (2, 1))] == [1e9, 1e8, 1e8, 1e8]


def test_alternatives_are_problems_of_their_own() -> None:
    asked = inputs(2, schedule="gpipe", micro_batches=2, expected_rows=4, memory=7000)
    by_remedy = {item.remedy: item.problem() for item in asked.alternatives(looped(2))}
    assert list(by_remedy) == [
        'set schedule="auto"',
        "set recompute=True",
        "use 4 micro-batches",
        "use 3 stages, on 1 more such server",
        "use 4 stages, on 2 more such servers",
        "use 8 stages, on 6 more such servers",
    ]
    assert list(by_remedy['set schedule="auto"'].live) == [2, 1]
    assert any(by_remedy["set recompute=True"].recomputes)
    smaller = by_remedy["use 4 micro-batches"]
    assert list(smaller.live) == [4, 4]
    assert smaller.held_bytes is not None
    assert smaller.held_bytes.tolist() == [50] * (NODES + 1)
    before = asked.problem(looped(2))
    sizes = [(one.size_bytes, two.size_bytes) for one, two in zip(smaller.values, before.values, strict=True)]
    assert all(half <= whole for half, whole in sizes)
    assert any(half < whole for half, whole in sizes)
    assert [by_remedy[remedy].stages for remedy in list(by_remedy)[3:]] == [3, 4, 8]
    assert all(a < b for a, b in itertools.pairwise(smaller.cuts))
