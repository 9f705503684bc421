"""Has a run planned anew from what its steps have taken, and takes it over to the new layout: `trainer.replan()`.

The state stays on the servers, and moves from one to another where it must. Leaves to others: planning (the
coordinator), connections (`session.py`), and what the trainer keeps of a layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gradwire.calls import replan_run
from gradwire.run_plan import RunPlan
from gradwire.session import Session
from gradwire.units import shown_seconds
from gradwire_protocol.errors import GradwireError, SettingsError, Unreachable
from gradwire_protocol.v1 import coordinator_pb2, run_pb2

MINIMUM_GAIN = 0.03


@dataclass(frozen=True, kw_only=True)
class Replan:
    """What planning a run anew came to. `print` says it in a sentence.

    moved: whether another layout has taken over. seconds_before, seconds_after: expected of a step, by what steps have
    taken: as it was laid out, and by the best plan found. plan: the one that holds now. tensors: how many were moved to
    another server, the optimizer's values for them included.
    """

    moved: bool
    seconds_before: float
    seconds_after: float
    tensors: int
    plan: RunPlan

    @property
    def gain(self) -> float:
        """Share of a step that the best plan found is expected to save; 0 where it is no better."""
        return max(0.0, 1.0 - self.seconds_after / self.seconds_before) if self.seconds_before > 0 else 0.0

    def __str__(self) -> str:
        times = f"{shown_seconds(self.seconds_before)} a step before, {shown_seconds(self.seconds_after)} after"
        if self.moved and not self.tensors:
            return f"the work is dealt out anew: {times} expected ({self.gain:.1%} less)"
        if self.moved:
            return f"the cuts moved, and {self.tensors} tensors with them: {times} expected ({self.gain:.1%} less)"
        if self.gain:
            return f"nothing moved: another plan is expected to save {self.gain:.1%} of a step only"
        return "nothing moved: no plan is expected to be faster"


def check_minimum_gain(minimum_gain: float) -> None:
    """SettingsError unless it is a share."""
    is_number = isinstance(minimum_gain, int | float) and not isinstance(minimum_gain, bool)
    if not is_number or not math.isfinite(minimum_gain) or not 0 <= minimum_gain < 1:
        raise SettingsError(
            "minimum_gain is not valid", expected="a share of a step, from 0 to below 1", got=repr(minimum_gain)
        )


def replan(
    session: Session, minimum_gain: float, save: Callable[[Path], object], load: Callable[[Path], object]
) -> coordinator_pb2.ReplanReply:
    """Wait for all that is open, and replan; return when the servers have the state where the new layout needs it.

    If it moved, the session is one of the new layout. Errors that come before that leave the run as it was, unless the
    run's own failure is the error. save, load: a checkpoint at a path of this machine, for state that does not move by
    itself.
    """
    reply = _ask(session, minimum_gain, reloads=False)
    if reply.needs_reload:
        with TemporaryDirectory(prefix="gradwire-replan-") as directory:
            path = Path(directory) / "state"
            save(path)
            reply = _ask(session, minimum_gain, reloads=True)
            if reply.moved:
                _follow(session, reply)
                try:
                    load(path)
                except GradwireError as error:
                    # The servers of the new layout have no state.
                    raise session.fail(error) from None
    elif reply.moved:
        _follow(session, reply)
    return reply


def _ask(session: Session, minimum_gain: float, *, reloads: bool) -> coordinator_pb2.ReplanReply:
    session.wait_idle()
    request = coordinator_pb2.ReplanRequest(run=session.run, minimum_gain=minimum_gain, reloads=reloads)
    try:
        return replan_run(*session.coordinator, request)
    except Unreachable as error:
        # Whether another layout has taken over is not known: nothing that is sent could be sure to arrive.
        raise session.fail(error) from None


def _follow(session: Session, reply: coordinator_pb2.ReplanReply) -> None:
    session.begin_generation(reply.layout)
    number = session.reserve()
    session.submit(run_pb2.Entry(number=number, new_plan=reply.new_plan)).result()


def count_moved(before: Sequence[coordinator_pb2.ServerLayout], after: Sequence[coordinator_pb2.ServerLayout]) -> int:
    """Return how many tensors servers hold that did not before."""
    held = {server.server: set(server.tensors) for server in before}
    return sum(len(set(server.tensors) - held.get(server.server, set())) for server in after)
