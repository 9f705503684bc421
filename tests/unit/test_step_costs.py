"""What actions cost beside their nodes: once a stage, and for messages where they leave the server."""

from __future__ import annotations

import numpy as np
import pytest

from gradwire_coordinator.costs import MEASURED, SPLIT_COST, NodeCosts
from gradwire_coordinator.measured_costs import ActionSeconds
from gradwire_coordinator.simulator import StageSeconds
from gradwire_coordinator.step_costs import stage_seconds, with_messages
from gradwire_protocol.program import INPUT_GRADIENT, WEIGHT_GRADIENT

ACTION = ActionSeconds(forward=0.01, backward=0.02, weight_gradient=0.03, receive=0.1, send=0.2)
EACH = np.full(4, 1.0)
COSTS = NodeCosts(2, EACH, EACH, EACH, np.zeros(4, np.int64), MEASURED, ACTION)


@pytest.mark.parametrize("again", [False, True])
def test_each_action_takes_something_once(again: bool) -> None:
    first, second = stage_seconds([COSTS] * 2, [1], [again] * 2)
    more = 1.01 if again else 0.0
    assert first.forward == pytest.approx(1.01)
    assert first.backward == pytest.approx(more + 0.02 + 2 / SPLIT_COST)
    assert first.of[INPUT_GRADIENT] == pytest.approx(more + 1.02)
    assert first.of[WEIGHT_GRADIENT] == pytest.approx(1.03)
    assert second.forward == pytest.approx(3.01)


def test_messages_cost_where_they_leave_the_server() -> None:
    """Stages 0 to 3 on servers 0, 1, 1, 0."""
    found = with_messages([StageSeconds.in_parts(1, 1, 1)] * 4, [COSTS] * 4, (0, 1, 1, 0))
    assert [each.forward for each in found] == pytest.approx([1.2, 1.1, 1.2, 1.1])
    assert [each.of[INPUT_GRADIENT] for each in found] == pytest.approx([1.1, 1.2, 1.1, 1.2])
    assert [each.of[WEIGHT_GRADIENT] for each in found] == [1] * 4
