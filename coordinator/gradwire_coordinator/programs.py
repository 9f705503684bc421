"""Which program each server runs for an entry: its schedule, and what it does around the micro-batches.

Pure. Leaves to others: the schedules themselves (`schedules.py`, `zero_bubble.py`, `auto_schedule.py`), choosing one
(`candidates.py`), and sending programs (`run.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from gradwire_coordinator.named_schedules import AUTO, schedule_of
from gradwire_coordinator.placement import Placement
from gradwire_coordinator.schedules import (
    AUTO_EXTRA_WARM_UP,
    Programs,
    first_micro_batches,
    forward_only,
    one_f_one_b,
)
from gradwire_coordinator.sharing import Sharing
from gradwire_coordinator.timetable import SENDS_GRADIENTS, check_programs
from gradwire_protocol.errors import FrameError, ModelError
from gradwire_protocol.program import AVERAGE, FORWARD, GATHER, NORM, REDUCE, UPDATE, Action, program_to_proto
from gradwire_protocol.v1 import graph_pb2, run_pb2

# Steps with up to so many micro-batches a server can lead further ahead than larger ones, if interleaved: a server is
# ahead by less than two rounds, and what it is ahead by changes with the second.
_UNEVEN_ROUNDS = 6


class ChosenSchedule:
    """The schedule of a run: where its stages are, and the programs of a step with any number of micro-batches."""

    def __init__(
        self,
        name: str,
        placement: Placement,
        *,
        extra_warm_up: int = 0,
        made: Programs | None = None,
    ) -> None:
        """name: of a named schedule, or "auto", whose programs are `made` for a step of the planned size.

        Of an "auto" schedule, smaller steps get the same programs less what is not there, so that they hold no more
        memory; larger ones those of the named schedule for these places.
        """
        self.name = name
        self.placement = placement
        self.extra_warm_up = extra_warm_up
        self._made = made
        self._made_for = 0 if made is None else 1 + max(action.micro_batch for program in made for action in program)
        self._checked = lru_cache(maxsize=64)(self._make_checked)

    def __str__(self) -> str:
        deeper = f"+{self.extra_warm_up}" if self.extra_warm_up else ""
        return f"{self.name}{deeper} on {self.servers} servers, {self.virtual_stages} stages each"

    @property
    def servers(self) -> int:
        return 1 + max(self.placement)

    @property
    def virtual_stages(self) -> int:
        """Stages on each server."""
        return len(self.placement) // self.servers

    def programs(self, micro_batches: int) -> Programs:
        """Return the forwards and backwards of one training step, by server. PlanError if they were not sound."""
        return self._checked(micro_batches)

    def extremes(self, most: int) -> list[Programs]:
        """Return programs that lead furthest ahead: in no step of up to `most` micro-batches is more underway.

        Orders that are regular lead the further ahead the more micro-batches there are. Those that go in rounds do so
        with uneven ones, and what was made has no rule.
        """
        counts = {most}
        if self._made is not None:
            counts |= set(range(1, min(self._made_for, most) + 1))
        if schedule_of(self.name, self.placement).name == "interleaved-1f1b":
            counts |= set(range(1, min(most, _UNEVEN_ROUNDS * self.servers) + 1))
        return [self.programs(count) for count in sorted(counts)]

    def _make_checked(self, micro_batches: int) -> Programs:
        programs = self._make(micro_batches)
        check_programs(programs, micro_batches, backward=True, placement=self.placement)
        return programs

    def _make(self, micro_batches: int) -> Programs:
        if self._made is not None and micro_batches <= self._made_for:
            return first_micro_batches(self._made, micro_batches)
        named = schedule_of(self.name, self.placement)
        if named.name == "1f1b":
            extra = AUTO_EXTRA_WARM_UP if self.name == AUTO else self.extra_warm_up
            return one_f_one_b(self.servers, micro_batches, extra)
        return named.programs(self.servers, micro_batches, self.virtual_stages)


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
    """The programs of a run's entries. Made once for each kind of entry and micro-batches of a replica."""

    def __init__(
        self,
        schedule: ChosenSchedule,
        *,
        tied_servers: Collection[int],
        active_stages: Mapping[graph_pb2.GraphKind, Collection[int]],
        replicas: int = 1,
        shards: int = 1,
        sharing: Sharing | None = None,
    ) -> None:
        """tied_servers: positions of those that hold a copy of a trained parameter that another server holds too.

        active_stages: for each graph the stages that have a segment of it; the others have no actions there. shards:
        servers of each position in each replica, which all run the same.
        """
        self._schedule = schedule
        self._tied_servers = frozenset(tied_servers)
        self._replicas = replicas
        self._shards = shards
        several = sharing if replicas > 1 else None
        # Replicas agree in every step, or every so many steps.
        self._every = several.exchange.every if several is not None and several.exchange.is_local else None
        self._gathers = several is not None and several.shards_optimizer
        self._parameter_servers = 0 if sharing is None else sharing.parameter_servers
        self._active_stages = active_stages
        self._train = lru_cache(maxsize=64)(self._make_train)
        self._forward = lru_cache(maxsize=64)(self._make_forward)

    def of_entry(self, entry: run_pb2.Entry) -> list[run_pb2.Program]:
        """Return the program of each server for an entry: by replica, position and shard; then of parameter servers."""
        kind = entry.WhichOneof("kind")
        if kind == "train_step":
            step = entry.train_step
            norm = step.HasField("max_gradient_norm")
            averages = self._every is not None and step.step % self._every == 0
            programs = [
                program
                for own in self._dealt(step.micro_batches)
                for program in self._train(own, with_norm=norm, averages=averages)
                for _ in range(self._shards)
            ]
            kinds = (REDUCE, *((NORM,) if norm else ()), UPDATE, GATHER)
            update = program_to_proto([Action(0, kind, 0) for kind in kinds])
            return [*programs, *[update] * self._parameter_servers]
        if kind == "evaluate":
            return self._forwards(graph_pb2.GRAPH_KIND_EVALUATE, entry.evaluate.micro_batches)
        if kind == "predict":
            return self._forwards(graph_pb2.GRAPH_KIND_PREDICT, entry.predict.micro_batches)
        if kind in ("load_state", "fetch_state", "save_state", "new_plan"):
            grid = self._replicas * self._schedule.servers * self._shards
            return [run_pb2.Program() for _ in range(grid + self._parameter_servers)]
        raise FrameError("An entry of no kind", expected="a step, an evaluation, …", got=f"entry {entry.number}")

    def _dealt(self, parts: Sequence[run_pb2.MicroBatch]) -> list[tuple[int, ...]]:
        """Return the micro-batches of each replica, which may have none."""
        own: list[list[int]] = [[] for _ in range(self._replicas)]
        for part in parts:
            own[part.replica].append(part.index)
        return [tuple(indices) for indices in own]

    def _make_train(self, micro_batches: tuple[int, ...], *, with_norm: bool, averages: bool) -> list[run_pb2.Program]:
        """Return the programs of one replica, by position. Without a micro-batch they have what ends the step."""
        programs = self._schedule.programs(len(micro_batches)) if micro_batches else [()] * self._schedule.servers
        found = []
        for server, program in enumerate(programs):
            reduces = (self._replicas > 1 and self._every is None) or server in self._tied_servers
            if self._parameter_servers:
                around = [(REDUCE, True), (GATHER, True)]
            else:
                around = [
                    *((REDUCE, reduces), (NORM, with_norm), (UPDATE, True)),
                    *((GATHER, self._gathers), (AVERAGE, averages)),
                ]
            ends = (Action(0, kind, 0) for kind, wanted in around if wanted)
            found.append(program_to_proto([*_renumbered(program, micro_batches), *ends]))
        return found

    def _forwards(self, graph: graph_pb2.GraphKind, parts: Sequence[run_pb2.MicroBatch]) -> list[run_pb2.Program]:
        programs = [
            program for own in self._dealt(parts) for program in self._forward(graph, own) for _ in range(self._shards)
        ]
        return [*programs, *(run_pb2.Program() for _ in range(self._parameter_servers))]

    def _make_forward(self, graph: graph_pb2.GraphKind, micro_batches: tuple[int, ...]) -> list[run_pb2.Program]:
        if graph not in self._active_stages:
            raise ModelError(
                "The model has no prediction graph",
                got="a model whose own output is the loss",
                remedy="give the trainer a loss, and a model that returns predictions",
            )
        active = self._active_stages[graph]
        if not micro_batches:
            return [run_pb2.Program() for _ in range(self._schedule.servers)]
        programs = forward_only(self._schedule.servers, len(micro_batches), self._schedule.placement)
        return [
            program_to_proto(_renumbered([action for action in program if action.stage in active], micro_batches))
            for program in programs
        ]


def _renumbered(program: Sequence[Action], micro_batches: Sequence[int]) -> list[Action]:
    """Return a program for these micro-batches of a step, in place of its first ones."""
    return [action._replace(micro_batch=micro_batches[action.micro_batch]) for action in program]
