"""What no schedule can beat: seconds that a step takes at the least, whatever the order of its actions.

Pure. Leaves to others: what a given order takes (`simulator.py`).
"""

from __future__ import annotations

from gradwire_coordinator.placement import hosted
from gradwire_coordinator.simulator import StepCosts
from gradwire_protocol.program import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT


def lower_bound(costs: StepCosts, micro_batches: int, *, splits: bool = True) -> float:
    """Return the seconds that a step of so many micro-batches takes at least on these stages.

    The most of: one micro-batch all the way there and back; and for every server its fill, until the first input can be
    there, its work, and its drain, what earlier stages still do after its last gradient, or what it does itself at the
    end of a step. splits: whether backwards may be in two parts, so that weight gradients run while others drain.
    """
    seconds = [stage.of for stage in costs.stages]
    forward = [of[FORWARD] for of in seconds]
    # What a gradient needs at least to leave a stage, and what a whole backward takes at least.
    passing = [min(of[BACKWARD], of[INPUT_GRADIENT]) if splits else of[BACKWARD] for of in seconds]
    backward = [
        min(of[BACKWARD], of[INPUT_GRADIENT] + of[WEIGHT_GRADIENT]) if splits else of[BACKWARD] for of in seconds
    ]
    last = len(seconds) - 1
    links = [costs.link(stage, stage + 1) for stage in range(last)]
    travel = [(link.forward + link.delay, link.backward + link.delay) if link else (0.0, 0.0) for link in links]
    # fill[s]: until the first input of stage s can be there; drain[s]: from its last gradient to the end of the step.
    at_the_end = [costs.seconds_at_the_end(server) for server in range(1 + max(costs.placement))]
    fill, drain = [0.0], [at_the_end[costs.placement[0]]]
    for stage in range(1, last + 1):
        fill.append(fill[-1] + forward[stage - 1] + travel[stage - 1][0])
    for stage in range(1, last + 1):
        # Stage 0 sends nothing: what is left of it is its whole backward.
        before = backward[0] if stage == 1 else passing[stage - 1]
        drain.append(drain[-1] + travel[stage - 1][1] + before)
    there_and_back = fill[last] + forward[last] + (passing[last] if last else backward[0]) + drain[last]
    bounds = [there_and_back]
    for own, after in zip(hosted(costs.placement), at_the_end, strict=True):
        first = min(fill[stage] for stage in own)
        work = micro_batches * sum(forward[stage] + backward[stage] for stage in own)
        if splits:
            # Its weight gradients may all come while others drain.
            must_precede = micro_batches * sum(forward[stage] + passing[stage] for stage in own)
            bounds += [first + work + after, first + must_precede + min(drain[stage] for stage in own)]
        else:
            bounds += [first + work + after, first + work + min(drain[stage] for stage in own)]
    return max(bounds)
