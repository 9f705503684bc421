"""The coordinator's RPCs: what comes over the wire is checked here, and passed to the registry and the runs.

Leaves to others: the server around it (`gradwire_protocol.serving`), planning (`planner.py`), a run's life (`run.py`).
"""

# ruff: noqa: N802  # gRPC gives the methods their names

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from gradwire_coordinator.cost_book import CostBook
from gradwire_coordinator.driving import drive, first_message, in_background
from gradwire_coordinator.history import earlier_runs
from gradwire_coordinator.identity import check_identity
from gradwire_coordinator.layout import Layout, lay_out
from gradwire_coordinator.link_rates import LinkBook
from gradwire_coordinator.log import RunLog
from gradwire_coordinator.metrics import Metrics
from gradwire_coordinator.model_checks import check_model, check_optimizer, check_plan
from gradwire_coordinator.partition import check_stage_count
from gradwire_coordinator.plan_summary import summarise
from gradwire_coordinator.planner import Planner, plan_run
from gradwire_coordinator.registry import Registry, Server, describe
from gradwire_coordinator.replan import Basis
from gradwire_coordinator.replanner import Replanner
from gradwire_coordinator.run import Run
from gradwire_coordinator.run_context import RunContext
from gradwire_coordinator.run_table import KEPT_RUNS, RunTable
from gradwire_coordinator.sharing import Sharing
from gradwire_coordinator.stored import inspect
from gradwire_coordinator.tensor.sharded_model import ShardedModel, shard_model
from gradwire_coordinator.tensor_checks import check_whole_parameters, stage_servers
from gradwire_coordinator.tensor_groups import make_units
from gradwire_protocol.checkpoint.root import CheckpointRoot
from gradwire_protocol.errors import PlanError, Unreachable
from gradwire_protocol.peer_roles import Peer
from gradwire_protocol.stream_limit import MAXIMUM_STREAMS, StreamLimit
from gradwire_protocol.v1 import coordinator_pb2 as pb
from gradwire_protocol.v1 import coordinator_pb2_grpc, run_pb2

_log = structlog.get_logger(__name__)

SWEEP_SECONDS = 1.0
UNDRIVEN_SECONDS = 60.0
# A Drive stream may keep its first message for so long.
_FIRST_MESSAGE_SECONDS = 10.0
_FIRST_GENERATION = 1
_LATE_SECONDS = 1.0
# Of creating a run, where servers turn out not to answer.
_ATTEMPTS = 3


class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """The service. `close()` ends all runs; the log, the registry and the metrics are the caller's."""

    def __init__(
        self,
        *,
        log: RunLog,
        registry: Registry,
        metrics: Metrics,
        connect: Callable[[str], Any],
        version: str,
        checkpoint_root: Path | None = None,
        costs: CostBook | None = None,
        undriven_seconds: float = UNDRIVEN_SECONDS,
        sweep_seconds: float = SWEEP_SECONDS,
        streams: int = MAXIMUM_STREAMS,
        first_message_seconds: float = _FIRST_MESSAGE_SECONDS,
    ) -> None:
        self._registry = registry
        self._replanner = Replanner()
        self._planner = Planner(LinkBook(connect), costs or CostBook(connect))
        self._metrics = metrics
        self._version = version
        self._undriven_seconds = undriven_seconds
        self._sweep_seconds = sweep_seconds
        self._streams = StreamLimit(streams, "Drive streams")
        self._first_message_seconds = first_message_seconds
        self._context = RunContext(
            log=log,
            connect=connect,
            checkpoints=CheckpointRoot(checkpoint_root, "The coordinator"),
            last_known=registry.last_known,
            standing=registry.standing,
            on_lost=self._on_lost,
            on_result=self._on_result,
            on_finished=self._on_finished,
        )
        self._closed = threading.Event()
        for run in log.fail_unfinished("the coordinator ended while it ran"):
            _log.warning("run left open by an earlier coordinator", run=run)
        self._runs = RunTable(earlier_runs(log, KEPT_RUNS))
        metrics.watch(lambda: [run.standing() for run in self._runs.current() if not run.is_over])
        # From when on no run is taken in any more, and until when those that there are must have ended.
        self._stops_by: float | None = None
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._sweeper.start()

    def ask_to_stop(self, seconds: float) -> None:
        """Take in no more runs, and ask the clients of those that there are to end them within this time."""
        self._stops_by = time.monotonic() + seconds
        for run in self._runs.current():
            run.ask_to_stop("the coordinator was asked to stop", seconds)

    @property
    def has_runs(self) -> bool:
        """Whether a run has not ended yet."""
        return not all(run.is_over for run in self._runs.current())

    def close(self) -> None:
        """End all runs and free their servers. Idempotent."""
        self._closed.set()
        runs = self._runs.current()
        for run in runs:
            run.end("the coordinator stopped")
        for run in runs:
            run.join()
        self._sweeper.join()

    # Servers.

    def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterReply:
        reply, replaced = self._registry.register(request, check_identity(Peer.of(context), request))
        _log.info("server registered", server=request.server, address=request.address)
        if replaced is not None:
            self._metrics.server_lost(replaced.role, "restarted")
            self._lost(replaced, "it registered again, so its process was restarted")
        self._count_servers()
        return reply

    def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatReply:
        self._registry.check_holder(request.server, _holder(context))
        leaving = request.HasField("leaves_in_seconds")
        server = self._registry.heartbeat(request.server, request.activity, leaving=leaving)
        run = self._runs.find(server.run)
        if leaving and run is not None:
            run.ask_to_stop(f"server {server.server} was asked to stop", request.leaves_in_seconds)
        return pb.HeartbeatReply()

    def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterReply:
        self._registry.check_holder(request.server, _holder(context))
        server = self._registry.deregister(request.server)
        if server is not None:
            _log.info("server left", server=server.server)
            self._lost(server, "it was stopped")
        self._count_servers()
        return pb.DeregisterReply()

    # Runs.

    def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunReply:
        if self._stops_by is not None:
            raise Unreachable(
                "The coordinator was asked to stop, and takes in no run any more",
                remedy="wait until it was started again",
            )
        run, layout = self._create_run(request, _checked(request), context)
        if self._closed.is_set() or not context.is_active():
            run.end("its client went away while it was prepared")
        self._count_runs()
        _log.info("run prepared", run=run.run, servers=list(run.places), schedule=layout.picture())
        return pb.CreateRunReply(
            run=run.run,
            generation=run.generation,
            servers=layout.for_client,
            plan=layout.summary,
            timeline=layout.timeline,
        )

    def Plan(self, request: pb.CreateRunRequest, context: Any) -> pb.PlanReply:
        sharded = _checked(request)
        name = f"plan-{uuid.uuid4().hex[:12]}"
        servers = self._registry.reserve(name, stage_servers(request.plan), sharded.indexed.operators)
        try:
            units = make_units(servers, request.plan.tensor)
            known = self._planner.measure(request.plan, sharded, units)
        finally:
            self._registry.release(name)
        planned = plan_run(request, sharded, units, known)
        return pb.PlanReply(plan=summarise(request.plan, planned), timeline=planned.timeline)

    def _create_run(self, request: pb.CreateRunRequest, sharded: ShardedModel, context: Any) -> tuple[Run, Layout]:
        """Create a run, with other servers if some do not answer and there are others."""
        attempt = 1
        silent: Unreachable | None = None
        while True:
            try:
                return self._try_create_run(request, sharded)
            except Unreachable as error:
                _log.warning("server did not answer", error=str(error))
                if attempt == _ATTEMPTS or not context.is_active():
                    raise
                attempt, silent = attempt + 1, error
            except PlanError as error:
                if silent is None:
                    raise
                # Too few are left because some do not answer.
                raise silent from error

    def _try_create_run(self, request: pb.CreateRunRequest, sharded: ShardedModel) -> tuple[Run, Layout]:
        name = f"run-{uuid.uuid4().hex[:12]}"
        servers = self._registry.reserve(name, stage_servers(request.plan), sharded.indexed.operators)
        try:
            units = make_units(servers, request.plan.tensor)
            helpers = self._registry.reserve(
                name,
                Sharing.of(request.plan, request.optimizer.name).parameter_servers,
                role=pb.SERVER_ROLE_PARAMETER,
            )
            planned = plan_run(request, sharded, units, self._planner.measure(request.plan, sharded, units))
            layout = lay_out(name, _FIRST_GENERATION, request, planned, helpers)
            run = Run(name, _FIRST_GENERATION, request, layout, self._context)
        except BaseException:
            self._registry.release(name)
            raise
        self._runs.add(run)
        if self._stops_by is not None:
            # It was asked while this one was laid out.
            run.ask_to_stop("the coordinator was asked to stop", max(0.0, self._stops_by - time.monotonic()))
        self._replanner.keep(name, Basis(request, planned, layout))
        run.prepare(request, layout.prepare)
        return run, layout

    def Drive(self, requests: Iterator[pb.DriveRequest], context: Any) -> Iterator[pb.DriveReply]:
        with self._streams:
            first = first_message(requests, self._first_message_seconds)
            if first is not None:
                yield from drive(self._runs.get(first.run), first, requests, context)

    def Replan(self, request: pb.ReplanRequest, context: Any) -> pb.ReplanReply:
        return self._replanner.replan(self._runs.get(request.run), request.minimum_gain, reloads=request.reloads)

    def EndRun(self, request: pb.EndRunRequest, context: Any) -> pb.EndRunReply:
        self._runs.get(request.run).end("it was ended on request")
        return pb.EndRunReply()

    def BeginSave(self, request: pb.BeginSaveRequest, context: Any) -> pb.BeginSaveReply:
        return pb.BeginSaveReply(token=self._runs.get(request.run).begin_save(request))

    def InspectCheckpoint(self, request: pb.InspectCheckpointRequest, context: Any) -> pb.InspectCheckpointReply:
        return inspect(self._context.checkpoints, request.directory)

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusReply:
        return pb.GetStatusReply(
            version=self._version,
            servers=[
                pb.ServerStatus(
                    server=server.server,
                    role=server.role,
                    address=server.address,
                    metrics_address=server.metrics_address,
                    device=server.device,
                    version=server.version,
                    silent_seconds=self._registry.silent_seconds(server),
                    activity=server.activity,
                    leaving=server.leaving,
                )
                for server in self._registry.servers()
            ],
            runs=self._runs.statuses(),
        )

    # What happens by itself.

    def _sweep(self) -> None:
        """Once a second: take out servers whose lease has run out, end runs that nobody drives or that stand still."""
        swept_at = time.monotonic()
        while not self._closed.wait(self._sweep_seconds):
            late_seconds = time.monotonic() - swept_at - self._sweep_seconds
            swept_at = time.monotonic()
            if late_seconds > _LATE_SECONDS:
                # This process was stopped, and could not hear heartbeats either.
                self._registry.forgive(late_seconds)
            for server in self._registry.expire():
                silent = self._registry.silent_seconds(server)
                _log.warning("server lost", server=server.server, silent_seconds=round(silent, 1))
                self._metrics.server_lost(server.role, "silent")
                self._lost(server, f"no heartbeat for {silent:.1f} s")
            for run in self._runs.current():
                if run.undriven_seconds() > self._undriven_seconds:
                    in_background(partial(run.end, f"no client drove it for {self._undriven_seconds:.0f} s"))
                elif overdue := run.overdue():
                    in_background(partial(run.end, overdue))
                elif (stall := run.find_stall()) is not None:
                    in_background(partial(run.fail, stall))
            self._count_servers()

    def _lost(self, server: Server, seen: str) -> None:
        run = self._runs.find(server.run)
        if run is not None:
            last_known = describe(server.activity, self._registry.silent_seconds(server))
            in_background(partial(run.server_lost, server.server, seen, last_known))

    def _on_lost(self, server: str) -> None:
        """Take out a server that does not answer; if it lives after all, its next heartbeat makes it register again."""
        if (known := self._registry.deregister(server)) is not None:
            _log.warning("server lost", server=server)
            self._metrics.server_lost(known.role, "unreachable")
        self._count_servers()

    def _on_result(self, run: Run, entry: run_pb2.Entry, result: run_pb2.EntryResult) -> None:
        self._replanner.take(run.run, entry, result)
        if entry.HasField("train_step"):
            self._metrics.step_finished(run.run, run.generation, run.places, result)
        if entry.number == 1:
            self._count_runs()

    def _on_finished(self, run: Run) -> None:
        self._registry.release(run.run)
        self._replanner.forget(run.run)
        if run.failure is not None:
            self._metrics.run_failed(run.failure)
        self._runs.prune()
        self._count_runs()

    def _count_servers(self) -> None:
        self._metrics.count_servers(server.role for server in self._registry.servers())

    def _count_runs(self) -> None:
        self._metrics.count_runs(run.state for run in self._runs.current())


def _holder(context: Any) -> str:
    """Return the name in the caller's certificate, empty for plaintext."""
    peer = Peer.of(context)
    return "" if peer is None else peer.name


def _checked(request: pb.CreateRunRequest) -> ShardedModel:
    """Return the model of a request that can be planned; the typed error of the first thing that is wrong with it."""
    check_plan(request.plan)
    indexed = check_model(request.model)
    check_optimizer(request.optimizer, indexed.tensors)
    sharded = shard_model(indexed, request.plan)
    check_whole_parameters(request.optimizer, sharded.indexed.tensors)
    cuts = sharded.indexed.train.usable_cuts(sharded.indexed.mutated)
    check_stage_count(request.plan.stages * request.plan.virtual_stages, cuts)
    return sharded
