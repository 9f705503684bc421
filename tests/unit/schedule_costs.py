"""Hypothesis strategies for what stages and links cost."""

from __future__ import annotations

from hypothesis import strategies as st

from gradwire_coordinator.placement import Placement, looped, v_shaped
from gradwire_coordinator.simulator import LinkSeconds, StageBytes, StageSeconds, StepCosts

_seconds = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 5.0])
_bytes = st.integers(0, 5)
_links = st.builds(LinkSeconds, _seconds, _seconds, _seconds)


@st.composite
def placements(draw, most: int = 5) -> Placement:
    servers = draw(st.integers(1, most))
    return draw(st.sampled_from([looped(servers), looped(servers, 2), looped(servers, 3), v_shaped(servers)]))


@st.composite
def step_costs(draw, most: int = 5) -> StepCosts:
    """Stages of all sizes, some of which take nothing; a backward in two parts takes as long as whole, or longer."""
    placement = draw(placements(most))
    count = len(placement)
    stages = []
    for _ in range(count):
        forward, first, second = draw(_seconds), draw(_seconds), draw(_seconds)
        saved = draw(st.sampled_from([0.0, 0.0, 0.03, 0.2])) * (first + second)
        stages.append(StageSeconds(forward, first + second - saved, first, second))
    links = tuple(draw(st.lists(_links, min_size=count - 1, max_size=count - 1)))
    held = tuple(StageBytes(draw(_bytes), draw(_bytes)) for _ in range(count))
    servers = 1 + max(placement)
    at_the_end = st.one_of(st.just([]), st.lists(_seconds, min_size=servers, max_size=servers)).map(tuple)
    return StepCosts(placement, tuple(stages), links, held, draw(at_the_end), draw(at_the_end))
