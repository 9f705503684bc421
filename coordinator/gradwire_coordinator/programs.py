"""Which program each stage runs for an entry: its schedule, and what it does around the micro-batches.

Pure. Leaves to others: the schedules themselves (`schedules.py`), and sending programs (`run.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache

from gradwire_coordinator.schedules import AUTO_EXTRA_WARM_UP, Programs, forward_only, gpipe, one_f_one_b
from gradwire_coordinator.timetable import SENDS_GRADIENTS
from gradwire_protocol.errors import FrameError, ModelError, PlanError
from gradwire_protocol.program import FORWARD, NORM, REDUCE, UPDATE, Action, program_to_proto
from gradwire_protocol.v1 import graph_pb2, run_pb2


def choose_schedule(name: str) -> tuple[str, int]:
    """Return (schedule, extra warm-up) for a plan's schedule; PlanError if it is not known."""
    choices = {"auto": ("1f1b", AUTO_EXTRA_WARM_UP), "1f1b": ("1f1b", 0), "gpipe": ("gpipe", 0)}
    if name not in choices:
        raise PlanError("Unknown schedule", expected=" or ".join(choices), got=repr(name[:40]))
    return choices[name]


def training_programs(schedule: str, extra_warm_up: int, stages: int, micro_batches: int) -> Programs:
    """Return the forwards and backwards of one training step."""
    makers: dict[str, Callable[[], Programs]] = {
        "gpipe": lambda: gpipe(stages, micro_batches),
        "1f1b": lambda: one_f_one_b(stages, micro_batches, extra_warm_up),
    }
    return makers[schedule]()


def recomputing_stages(programs: Programs) -> list[bool]:
    """Return which stages run forwards again under recomputation: those with work between a forward and its backward.

    Elsewhere (the last stage of 1F1B) keeping what a forward made takes no more memory than making it again would.
    """
    recomputing: dict[int, bool] = {}
    for program in programs:
        for action, following in itertools.pairwise([*program, None]):
            if action is not None and action.kind == FORWARD:
                own = [action._replace(kind=kind) for kind in SENDS_GRADIENTS]
                recomputing[action.stage] = recomputing.get(action.stage, False) or following not in own
    return [recomputing[stage] for stage in sorted(recomputing)]


class ProgramBook:
    """The programs of a run's entries. Made once for each kind of entry and number of micro-batches."""

    def __init__(
        self,
        *,
        schedule: str,
        extra_warm_up: int,
        stages: int,
        tied_stages: Collection[int],
        active_stages: Mapping[graph_pb2.GraphKind, Collection[int]],
    ) -> None:
        """`active_stages`: for each graph the stages that have a segment of it; the others have no actions there."""
        self._schedule = schedule
        self._extra_warm_up = extra_warm_up
        self._stages = stages
        self._tied_stages = frozenset(tied_stages)
        self._active_stages = active_stages
        self._train = lru_cache(maxsize=64)(self._make_train)
        self._forward = lru_cache(maxsize=64)(self._make_forward)

    def of_entry(self, entry: run_pb2.Entry) -> list[run_pb2.Program]:
        """Return the program of each stage for an entry, by stage."""
        kind = entry.WhichOneof("kind")
        if kind == "train_step":
            step = entry.train_step
            return self._train(len(step.micro_batches), step.HasField("max_gradient_norm"))
        if kind == "evaluate":
            return self._forward(graph_pb2.GRAPH_KIND_EVALUATE, len(entry.evaluate.micro_batches))
        if kind == "predict":
            return self._forward(graph_pb2.GRAPH_KIND_PREDICT, len(entry.predict.micro_batches))
        if kind in ("load_state", "fetch_state", "save_state"):
            return [run_pb2.Program() for _ in range(self._stages)]
        raise FrameError("An entry of no kind", expected="a step, an evaluation, …", got=f"entry {entry.number}")

    def _make_train(self, micro_batches: int, with_norm: bool) -> list[run_pb2.Program]:
        programs = training_programs(self._schedule, self._extra_warm_up, self._stages, micro_batches)
        for stage, program in enumerate(programs):
            around = [(REDUCE, stage in self._tied_stages), (NORM, with_norm), (UPDATE, True)]
            program += [Action(0, kind, 0) for kind, wanted in around if wanted]
        return [program_to_proto(program) for program in programs]

    def _make_forward(self, graph: graph_pb2.GraphKind, micro_batches: int) -> list[run_pb2.Program]:
        if graph not in self._active_stages:
            raise ModelError(
                "The model has no prediction graph",
                got="a model whose own output is the loss",
                remedy="give the trainer a loss, and a model that returns predictions",
            )
        active = self._active_stages[graph]
        return [
            program_to_proto(program if stage in active else [])
            for stage, program in enumerate(forward_only(self._stages, micro_batches))
        ]
