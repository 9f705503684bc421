"""What an optimizer keeps and takes: by its kind, its settings, and the parameters that it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_text import tensor

from gradwire_coordinator.costs import Rates
from gradwire_coordinator.optimizer_costs import OptimizerCosts
from gradwire_protocol.optimizer_state import StateBytes
from gradwire_protocol.v1 import graph_pb2, run_pb2

BYTES = 64  # of a tensor with 16 elements
RATES = Rates(flops_per_second=1e9, bytes_per_second=1e6)


def optimizer(name: str, **settings: Any) -> run_pb2.Optimizer:
    made = run_pb2.Optimizer(name=name)
    group = made.groups.add(parameters=["a", "b"])
    for key, value in settings.items():
        kind = {bool: "boolean", float: "real", int: "integer"}[type(value)]
        group.settings.add(name=key, value=graph_pb2.Argument(**{kind: value}))
    return made


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("Adam", {}),
        ("AdamW", {"amsgrad": True}),
        ("Adamax", {}),
        ("NAdam", {}),
        ("RAdam", {}),
        ("RMSprop", {"momentum": 0.5, "centered": True}),
        ("Adagrad", {}),
        ("Adadelta", {}),
        ("Rprop", {}),
        ("ASGD", {}),
    ],
)
def test_state_is_what_torch_keeps(name: str, settings: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.randn(16))
    parameter.grad = torch.randn(16)
    real = getattr(torch.optim, name)([parameter], lr=0.01, **settings)
    real.step()
    kept = sum(
        value.numel() * 4
        for value in real.state[parameter].values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    )
    assert OptimizerCosts(optimizer(name, **settings)).held([tensor("a")]) == StateBytes(BYTES, BYTES, kept)


def test_only_what_trains_has_more_than_its_weights() -> None:
    costs = OptimizerCosts(optimizer("Adam"))
    frozen = tensor("b")
    frozen.requires_grad = False
    # "c" trains, but no optimizer has it: it has a gradient, and is never updated.
    held = costs.held([tensor("a"), frozen, tensor("c"), tensor("running_mean", "buffer")])
    assert held == StateBytes(4 * BYTES, 2 * BYTES, 2 * BYTES)
    assert held.total == 8 * BYTES
    assert costs.update_seconds([tensor("a"), frozen, tensor("c")], RATES) == costs.update_seconds([tensor("a")], RATES)


def test_updates_take_time_as_memory_does() -> None:
    plain, momentum, adam = (
        OptimizerCosts(each).update_seconds([tensor("a")], RATES)
        for each in (optimizer("SGD"), optimizer("SGD", momentum=0.9), optimizer("Adam"))
    )
    assert 0 < plain < momentum < adam
    # Twice as fast a memory.
    faster = Rates(flops_per_second=1e9, bytes_per_second=2e6)
    assert OptimizerCosts(optimizer("Adam")).update_seconds([tensor("a")], faster) == pytest.approx(adam / 2)


def test_replicas_that_share_state_hold_and_update_a_part_each() -> None:
    whole, part = OptimizerCosts(optimizer("Adam")), OptimizerCosts(optimizer("Adam"), sharers=3)
    alone, shared = whole.held([tensor("a")]), part.held([tensor("a")])
    assert (shared.weights, shared.gradients) == (alone.weights, alone.gradients)
    # Rounded up, parameter by parameter: who gets the rest is not said.
    assert shared.optimizer == -(-alone.optimizer // 3) == 43
    assert part.held([tensor("a"), tensor("b")]).optimizer == 2 * 43
    assert part.update_seconds([tensor("a")], RATES) == pytest.approx(whole.update_seconds([tensor("a")], RATES) / 3)


def test_what_no_optimizer_has_is_not_shared_either() -> None:
    held = OptimizerCosts(optimizer("SGD"), sharers=2).held([tensor("a"), tensor("c"), tensor("mean", "buffer")])
    assert held == StateBytes(3 * BYTES, 2 * BYTES, 0)


def test_an_optimizer_that_is_not_known_keeps_the_most() -> None:
    assert OptimizerCosts(optimizer("Sophia")).held([tensor("a")]).optimizer == 3 * BYTES
