"""The trainer: what a training loop calls. Turns its calls into entries of the run's log, and results into values.

Leaves connections to session.py, batches to dispatch.py, the graph to gradwire.graph, and the optimizer's reading to
optimizers.py.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from gradwire.batches import Batch, batches_of, length_of
from gradwire.calls import create_run
from gradwire.checkpoint.background import Save
from gradwire.checkpoint.run import RunCheckpoints, Storage
from gradwire.dispatch import Dispatcher, evaluate, predict
from gradwire.graph import ExportedModel
from gradwire.graph.dynamic import Dynamic
from gradwire.measured_steps import MeasuredSteps
from gradwire.plan import Plan
from gradwire.present_model import present_model
from gradwire.progress import is_terminal, with_progress
from gradwire.replanning import MINIMUM_GAIN, Replan, check_minimum_gain, count_moved, replan
from gradwire.report import Report, make_report
from gradwire.results import StepResult
from gradwire.run_plan import RunPlan
from gradwire.run_request import make_request
from gradwire.session import Session
from gradwire.state import StateNames
from gradwire.stepping import OpenStep, check_loop, in_flight
from gradwire.stopping import OnStop, stop
from gradwire.verification import Verification, verify
from gradwire.weights import Weights, WeightSource
from gradwire_protocol.errors import ModelError, SettingsError, Stopping
from gradwire_protocol.v1 import graph_pb2, run_pb2

if TYPE_CHECKING:
    from types import TracebackType

    from gradwire.cluster import Cluster


class Trainer:
    """Trains one model on a cluster; made by `cluster.trainer(...)`. A context manager; for one thread at a time.

    Once made, it holds no weights: neither the model nor the optimizer is kept alive by it. A failure ends the run:
    every call from then on raises that one error.
    """

    def __init__(
        self,
        cluster: Cluster,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[..., Any] | nn.Module | None,
        example: tuple[Any, ...] | Mapping[str, Any],
        plan: Plan,
        seed: int,
        max_grad_norm: float | None,
        precision: str | None,
        description: str,
        weights: Weights = None,
        dynamic: Dynamic | None = None,
        micro_batch_rows: int | None = None,
        on_stop: OnStop | None = None,
    ) -> None:
        request = make_request(
            model,
            optimizer,
            loss=loss,
            example=example,
            plan=plan,
            seed=seed,
            max_grad_norm=max_grad_norm,
            precision=precision,
            description=description,
            dynamic=dynamic,
            micro_batch_rows=micro_batch_rows,
        )
        self._cluster = cluster
        self._model = weakref.ref(model)
        self._loss = loss
        self._plan = plan
        self._max_grad_norm = max_grad_norm
        self._precision = precision
        self._seed = seed
        self._step = 0
        self._on_stop = on_stop
        self._stopping: Stopping | None = None
        self._measured = MeasuredSteps()
        self._expected_rows = request.message.plan.expected_rows
        self._exported = request.exported
        self._proto = self._exported.proto
        source = WeightSource(weights, model, self._proto, request.tensors)
        self._optimizer = request.optimizer
        self._layout = create_run(cluster.channel, cluster.target, request.message)
        owned = (name for server in self._layout.servers for name in server.owned_tensors)
        self._names = StateNames(model, self._proto.tensors, owned)
        self._session = Session(
            self._layout,
            channel=cluster.channel,
            target=cluster.target,
            open_channel=cluster.open_channel,
            window=plan.window,
            stall_seconds=plan.stall_seconds,
            checksums=plan.checksums,
        )
        shares = self._layout.plan.replica_shares
        self._dispatcher = Dispatcher(self._session, self._exported, plan.microbatches, shares)
        self._checkpoints = RunCheckpoints(
            self._session,
            self._names,
            self._optimizer,
            self._proto,
            tensors=request.tensors,
            seed=seed,
        )
        try:
            self._names.keep(source.unused())
            source.deliver(self._session)
        except BaseException:
            self.close()
            raise
        # From here on the weights are the servers'.
        self._exported.tensors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Stopping):
            self._session.abort()  # a checkpoint on its way is given up
        self.close()

    @property
    def run_id(self) -> str:
        """The run's identifier, as the coordinator shows it."""
        return self._layout.run

    @property
    def steps_done(self) -> int:
        """Number of the last step that was dispatched, or that a loaded checkpoint follows."""
        return self._step

    @property
    def plan(self) -> RunPlan:
        """The plan as it is carried out: its stages and servers, and what is expected of a step, with alternatives."""
        return RunPlan.from_proto(self._layout.plan, self._layout.timeline)

    @property
    def servers(self) -> tuple[str, ...]:
        """The names of the stage servers that carry the run out."""
        return tuple(server.server for server in self._layout.servers if not server.parameter_server)

    @property
    def exported(self) -> ExportedModel:
        """The model as data, without its weights."""
        return self._exported

    def step(self, *args: Any, **kwargs: Any) -> StepResult:
        """Train on one batch, given as the model's example was; return when the step is done.

        Stopping, instead of a step, if the run is to end (see `request_stop`).
        """
        self._stop_if_asked()
        return self._dispatch_step(args or kwargs).wait()

    def run(
        self,
        loader: Iterable[Any],
        *,
        steps: int | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        progress: bool | None = None,
    ) -> Iterator[StepResult]:
        """Train on the loader's batches, keeping up to `window` steps in flight; yield each step's result, in order.

        steps: how many; the loader is begun anew when it ends. None: once through the loader. scheduler: advanced when
        a step is dispatched, after its hyperparameters were read. progress: a bar on standard error; None: if that is a
        terminal. `evaluate` inside the loop follows the last step dispatched, which is ahead of the last one yielded.
        If the run is to end, Stopping is raised when the steps in flight have been yielded.
        """
        check_loop(steps, scheduler)
        results = in_flight(
            batches_of(loader, steps),
            self._dispatch_step,
            window=self._plan.window,
            scheduler=scheduler,
            is_stopping=lambda: self.is_stopping,
            stop=self._stop_if_asked,
        )
        if progress is False or (progress is None and not is_terminal()):
            return results
        return with_progress(results, steps if steps is not None else length_of(loader))

    def evaluate(self, loader: Iterable[Any]) -> float:
        """Return the mean loss over all samples of the loader's batches, in evaluation mode; changes nothing."""
        return evaluate(self._dispatcher, batches_of(loader, None), self._plan.window)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for one batch without targets, in evaluation mode, with the current weights."""
        if not self._proto.HasField("predict"):
            raise ModelError(
                "The model has no output to predict: its output is the loss",
                remedy="give the loss apart from the model: loss=(output, target) -> scalar",
            )
        return predict(self._dispatcher, self._session, self._exported, self._layout.servers, args or kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the current weights on the CPU under exactly the keys of `model.state_dict()`.

        Tied keys share one tensor. What no graph uses stays as the module or the weight files have it.
        """
        number = self._session.reserve()
        future = self._session.submit(run_pb2.Entry(number=number, fetch_state=run_pb2.FetchState()))
        return self._names.assemble(self._collect_tensors(number, future))

    def step_with_gradients(self, *args: Any, **kwargs: Any) -> tuple[StepResult, dict[str, torch.Tensor]]:
        """Train on one batch, and return also the gradients that the optimizer saw, by parameter name.

        Parameters that the loss does not depend on are missing. Tied parameters stand under their first name.
        """
        self._stop_if_asked()
        step = self._dispatch_step(args or kwargs, return_gradients=True)
        gradients = self._collect_tensors(step.sent.number, step.sent.future)
        return step.wait(), gradients

    def report(self, *, steps: int = 20) -> Report:
        """Compare what the plan predicts of a step with what the last steps took, and say what to do about it.

        steps: how many of the last finished ones at most; the first of a plan warms up, and does not count.
        SettingsError if there are none.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise SettingsError("steps is not valid", expected="a whole number, 1 or more", got=repr(steps))
        return make_report(
            self.plan,
            self._measured.last(steps),
            self.servers,
            rows=self._expected_rows,
            recompute=self._plan.recompute,
        )

    def replan(self, *, minimum_gain: float = MINIMUM_GAIN) -> Replan:
        """Plan anew from what the steps so far have taken, and move the cuts if a step is expected to be faster.

        Waits for all steps in flight, and for checkpoints that are being written. The state stays on the servers, and
        moves from one to another where it must: training goes on as if nothing had happened, on the same servers. Cuts
        that the plan gave do not hold any more. minimum_gain: the share of a step that must be expected to be saved;
        otherwise nothing changes. PlanError if no step was measured: the first one of a layout warms up, and does not
        count; and with parameter servers, which this version does not plan anew. With replicas, which then get their
        shares of the micro-batches anew too, and with several servers a stage, the state goes through a checkpoint in
        this machine's temporary directory. Whatever fails while the state moves ends the run.
        """
        check_minimum_gain(minimum_gain)
        self._checkpoints.settle()
        self._checkpoints.report()
        before = self._session.servers
        reply = replan(self._session, minimum_gain, self.save, self.load)
        if reply.moved:
            self._layout = reply.layout
            self._dispatcher.deal_by(reply.layout.plan.replica_shares)
            self._measured.begin_anew()
        return Replan(
            moved=reply.moved,
            seconds_before=reply.seconds_before,
            seconds_after=reply.seconds_after,
            tensors=count_moved(before, self._session.servers),
            plan=self.plan,
        )

    def verify(self, batch: Any, *, double: bool = True) -> Verification:
        """Compare one step of this run's model, from its current weights, with the same step in this process.

        The run itself is not touched: a second, short one with the same plan takes the step, on other stage servers.
        A local cluster starts those that it lacks, and ends them afterwards; elsewhere as many as this run has must be
        free. Both sides begin with an optimizer without state, of this run's class and present hyperparameters.

        batch: as a loader gives it. double: compare in float64, which judges the updated weights too. PlanError if
        there are too few free servers; ModelError if the user has let go of the model, or if it draws random numbers
        in a way that one process cannot follow, or on another kind of device than the servers do; OptimizerError if
        the user has let go of the optimizer.
        """
        present = present_model(self._model(), self.state_dict)
        helpers = len(self._layout.servers) - len(self.servers)
        busy = [server.server for server in self._layout.servers]
        with self._cluster.spare_servers(len(self.servers), helpers, busy=busy):
            return verify(
                self._cluster,
                present,
                self._optimizer.remake,
                loss=self._loss,
                batch=batch,
                plan=self._plan,
                max_grad_norm=self._max_grad_norm,
                double=double,
                precision=self._precision,
                seed=self._seed,
                micro_batch_rows=self._exported.batch.micro_batch_rows,
            )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        data_position: Mapping[str, Any] | None = None,
        wait: bool = True,
        storage: Storage = "client",
    ) -> Save:
        """Write a checkpoint to a directory: weights, buffers, the optimizer's state and settings, the step, the seed.

        It has the state after the last dispatched step, and takes the place of a checkpoint that is there, whole or not
        at all. data_position: what `load` shall give back, such as where the loader was; must have a form in JSON.
        wait: until it is on disk; otherwise it is written while training goes on, and a failure is raised by the
        result's `wait`, or else reported as a CheckpointWarning by one of the next calls. storage: "client": this
        process writes it; "server": the stage servers do, each its part, to a path below their --checkpoint-root.
        CheckpointError for what cannot be written; SettingsError if servers cannot write there.
        """
        save = self._checkpoints.save(Path(path), self._step, data_position, storage)
        if wait:
            save.wait()
        return save

    def load(self, path: str | os.PathLike[str], *, storage: Storage = "client") -> dict[str, Any] | None:
        """Continue from a checkpoint, as the run that saved it would have; return its data_position.

        Steps are numbered on from its step. The hyperparameters of the optimizer's groups, the user's own optimizer's
        too, are set to what they were; schedulers are the user's to restore (scheduler.load_state_dict). Plan, servers
        and window may be others. CheckpointError, before anything has changed, if a file is not whole, or if model,
        optimizer or seed are not those of the checkpoint. storage: "server": the path is one below the servers'
        --checkpoint-root, and they read it, whoever wrote it.
        """
        manifest = self._checkpoints.load(Path(path), storage)
        self._step = manifest.step
        return manifest.data_position

    def close(self) -> None:
        """End the run and free its servers, when a checkpoint on its way is on disk. Idempotent."""
        self._checkpoints.settle()
        self._checkpoints.report()
        self._session.close()

    def request_stop(self, reason: str = "this process was asked to stop") -> None:
        """Have the run end before its next step. From any thread, or a signal's handler; returns at once.

        The coordinator does the same when it, or a server of the run, has got SIGTERM. Instead of its next step, the
        training loop gets Stopping, when the state has been saved: by the trainer's on_stop, or to RUN/step-N below the
        servers' --checkpoint-root. Everything but steps can still be done then, for as long as the services wait.
        """
        self._session.request_stop(reason)

    @property
    def is_stopping(self) -> bool:
        """Whether the run is to end before its next step."""
        return bool(self._session.stop_reason)

    def _stop_if_asked(self) -> None:
        reason = self._session.stop_reason
        if not reason:
            return
        if self._stopping is None:
            self._stopping = stop(self, reason, self._on_stop)
        raise self._stopping

    def _dispatch_step(self, batch: Batch, *, return_gradients: bool = False) -> OpenStep:
        self._checkpoints.report()

        def entry(parts: list[run_pb2.MicroBatch]) -> run_pb2.Entry:
            train_step = run_pb2.TrainStep(
                step=self._step + 1,
                micro_batches=parts,
                hyperparameters=self._optimizer.hyperparameters(),
                max_gradient_norm=self._max_grad_norm,
                return_gradients=return_gradients,
            )
            return run_pb2.Entry(train_step=train_step)

        sent = self._dispatcher.send(batch, graph_pb2.GRAPH_KIND_TRAIN, entry)
        self._step += 1
        self._optimizer.mark_dispatched()
        self._measured.follow(self._step, sent.rows, sent.future)
        return OpenStep(self._step, sent)

    def _collect_tensors(self, number: int, future: Future[run_pb2.EntryResult]) -> dict[str, torch.Tensor]:
        servers = [server for server in self._layout.servers if server.owned_tensors]
        results = self._session.collect(number, servers)
        future.result()
        return {result.value: result.content for result in results if isinstance(result.content, torch.Tensor)}
