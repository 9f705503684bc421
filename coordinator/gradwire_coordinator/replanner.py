"""Keeps what runs were planned from and what their steps take, and has another layout take a run over.

Leaves to others: which layout is best and what moves (`replan.py`), and the run itself (`run.py`).
"""

from __future__ import annotations

import math

import structlog

from gradwire_coordinator.layout import lay_out
from gradwire_coordinator.replan import Basis, new_plan, plan_anew, reload_plan
from gradwire_coordinator.run import Run
from gradwire_protocol.errors import PlanError, RunNotFound
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import run_pb2

_log = structlog.get_logger(__name__)


class Replanner:
    """The bases of all runs that are not over. Thread-safe: a run is planned anew only while none of its steps ends."""

    def __init__(self) -> None:
        self._bases: dict[str, Basis] = {}

    def keep(self, run: str, basis: Basis) -> None:
        """Remember what a run was planned from."""
        self._bases[run] = basis

    def take(self, run: str, entry: run_pb2.Entry, result: run_pb2.EntryResult) -> None:
        """Take in what an entry has taken, if it is a training step."""
        basis = self._bases.get(run)
        if basis is not None and entry.HasField("train_step"):
            basis.take(entry.train_step, result)

    def forget(self, run: str) -> None:
        """The run is over."""
        self._bases.pop(run, None)

    def replan(self, run: Run, minimum_gain: float, *, reloads: bool = False) -> pb.ReplanReply:
        """Plan a run anew, and have another layout take it over if that pays.

        reloads: the client can load the state into it. With replicas or shards it must: the state is spread over them.
        PlanError and the like before anything has changed; a failure after that is the run's end, too.
        """
        if not (math.isfinite(minimum_gain) and 0 <= minimum_gain < 1):
            raise PlanError("minimum_gain is not valid", expected="from 0 to below 1", got=str(minimum_gain))
        with run.between_entries():
            basis = self._bases.get(run.run)
            if basis is None:
                raise RunNotFound("There is no such run", got=repr(run.run))
            found = plan_anew(basis)
            reply = pb.ReplanReply(seconds_before=found.seconds_before, seconds_after=found.seconds_after)
            if not found.pays(minimum_gain):
                return reply
            plan = basis.request.plan
            moves = plan.replicas == 1 and basis.planned.sharded.shards == 1
            if not moves and not reloads:
                reply.needs_reload = True
                return reply
            layout = lay_out(run.run, run.generation + 1, basis.request, found.planned)
            for server in layout.prepare:
                server.takes_over = moves
            replies = run.switch(run.generation + 1, layout)
            entry = new_plan(found.planned, basis.layout, layout, replies) if moves else reload_plan(found.planned)
            run.expect(entry)
            self.keep(run.run, Basis(basis.request, found.planned, layout))
        _log.info(
            "run planned anew",
            run=run.run,
            generation=run.generation,
            cuts=list(entry.cuts),
            moves=len(entry.moves),
            seconds_before=round(found.seconds_before, 4),
            seconds_after=round(found.seconds_after, 4),
        )
        reply.moved = True
        reply.layout.CopyFrom(
            pb.CreateRunReply(
                run=run.run,
                generation=run.generation,
                servers=layout.for_client,
                plan=layout.summary,
                timeline=layout.timeline,
            )
        )
        reply.new_plan.CopyFrom(entry)
        return reply
