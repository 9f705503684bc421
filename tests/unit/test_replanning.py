"""What planning anew came to, in words."""

from __future__ import annotations

import pytest
from plan_samples import summary

from gradwire.replanning import Replan
from gradwire.run_plan import RunPlan

PLAN = RunPlan.from_proto(summary())
MOVED = "the cuts moved, and 3 tensors with them"


@pytest.mark.parametrize(
    ("moved", "after", "gain", "words"),
    [
        (True, 0.1, 0.5, f"{MOVED}: 200 ms a step before, 100 ms after expected (50.0% less)"),
        (False, 0.196, 0.02, "nothing moved: another plan is expected to save 2.0% of a step only"),
        (False, 0.2, 0.0, "nothing moved: no plan is expected to be faster"),
        (False, 0.25, 0.0, "nothing moved: no plan is expected to be faster"),
    ],
)
def test_it_says_what_was_done_and_what_is_gained(moved: bool, after: float, gain: float, words: str) -> None:
    made = Replan(moved=moved, seconds_before=0.2, seconds_after=after, tensors=3, plan=PLAN)
    assert made.gain == pytest.approx(gain)
    assert str(made) == words
