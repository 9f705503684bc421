"""A cluster as a script sees it: connect to a coordinator, look at it, make trainers.

Imports torch for trainers only.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from gradwire.calls import coordinator_stub, plan_run
from gradwire.plan import Plan
from gradwire_protocol.channels import open_channel, parse_address
from gradwire_protocol.errors import PlanError, from_rpc_error
from gradwire_protocol.roles import Served
from gradwire_protocol.tls_files import TlsFiles
from gradwire_protocol.v1 import coordinator_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gradwire.graph.dynamic import Dynamic
    from gradwire.grid_search import GridSearch
    from gradwire.run_plan import RunPlan
    from gradwire.stopping import OnStop
    from gradwire.trainer import Trainer
    from gradwire.weights import Weights

_ANSWER_SECONDS = 5.0


class Cluster:
    """A coordinator and its stage servers; a context manager. Closing it ends the runs made from it.

    The channel connects on first use. Use `connect` to be told at once whether the coordinator is there.
    """

    def __init__(self, address: str, tls: TlsFiles | None = None, *, insecure: bool = False) -> None:
        self._address = address
        self._tls = tls
        self._insecure = insecure
        self._channel: Any = None
        self._trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            # What they have open is of no use any more: their servers are told at once.
            for trainer in list(self._trainers):
                trainer.__exit__(kind, error, traceback)
        self.close()

    @property
    def address(self) -> str:
        """HOST:PORT of the coordinator."""
        return self._address

    @property
    def target(self) -> str:
        """The coordinator, as errors name it."""
        return f"the coordinator at {self._address}"

    @property
    def channel(self) -> Any:
        """The grpc.Channel to the coordinator."""
        if self._channel is None:
            exposure = self._tls.key_exposure() if self._tls is not None else ""
            if exposure:
                warnings.warn(exposure, stacklevel=2)
            self._channel = open_channel(self._address, self._tls, serves=Served.COORDINATOR, insecure=self._insecure)
        return self._channel

    def open_channel(self, address: str) -> Any:
        """Return a channel to a server of the cluster, with this cluster's credentials."""
        return open_channel(address, self._tls, insecure=self._insecure)

    def status(self) -> coordinator_pb2.GetStatusReply:
        """Return the coordinator's view: servers and what they do, runs. Unreachable if it does not answer in 5 s."""
        stub = coordinator_stub(self.channel)
        try:
            reply: coordinator_pb2.GetStatusReply = stub.GetStatus(
                coordinator_pb2.GetStatusRequest(), timeout=_ANSWER_SECONDS
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, target=self.target) from None
        return reply

    def trainer(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[..., Any] | nn.Module | None,
        example: tuple[Any, ...] | Mapping[str, Any],
        plan: Plan | None = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
        precision: str | None = None,
        description: str = "",
        weights: Weights = None,
        dynamic: Dynamic | None = None,
        micro_batch_rows: int | None = None,
        on_stop: OnStop | None = None,
    ) -> Trainer:
        """Lay a run out on the cluster, send the weights, and return its trainer.

        model: any torch.nn.Module that torch.export takes. optimizer: of torch.optim, over model.parameters(); its
        class, groups and hyperparameters are used, the latter as they are at each step. loss: (output, target) to a
        scalar, a mean over the rows, or to (sum, weight); None: the model's output is the loss. example: one batch, a
        tuple or a dict given as keyword arguments; dimension 0 is the batch. seed: of dropout and the like.
        max_grad_norm: clip the gradient's global norm to this. precision: None, the parameters' own type; "bf16":
        model and loss run under torch.autocast to bfloat16, with parameters and the optimizer in float32.

        weights: where parameters and persistent buffers come from. None: the module itself. A path (a .safetensors
        file, an index of shards, or a directory), or FileWeights: this process reads and sends them one by one.
        ServerWeights: each server reads its own. The module may then be on the meta device (see `meta_parameters`).
        Names are the module's, any of tied ones; types may be narrower than the module's; none may be missing.

        dynamic: names for dimensions besides the rows whose sizes differ from batch to batch; equal names mean equal
        sizes. For a dict example {"input_ids": {1: "length"}, "labels": {1: "length"}}; for a tuple one entry for each
        element, None where it has none: ({1: "length"}, None).

        micro_batch_rows: export for micro-batches of exactly so many rows, for a model that makes a number of them.
        Each batch must then have a multiple of these rows, up to the plan's micro-batches times as many; others are
        refused (BatchError). An output of the model counts as one for each row if its dimension 0 has that size.

        on_stop: called with the trainer, between two steps, when the run is to end (`Trainer.request_stop`), to save
        what is to be kept; the loop gets Stopping then. None: the servers write a checkpoint, if they have a root.

        Errors: ModelError, PlanError, OptimizerError, BatchError, SettingsError; DataError for weights; Unreachable,
        ServerBusy, StageFailed.
        """
        from gradwire.trainer import Trainer  # imports torch, which seeing a cluster's status does not need

        trainer = Trainer(
            self,
            model,
            optimizer,
            loss=loss,
            example=example,
            plan=plan or Plan(),
            seed=seed,
            max_grad_norm=max_grad_norm,
            precision=precision,
            description=description,
            weights=weights,
            dynamic=dynamic,
            micro_batch_rows=micro_batch_rows,
            on_stop=on_stop,
        )
        self._trainers.add(trainer)
        return trainer

    def plan(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[..., Any] | nn.Module | None,
        example: tuple[Any, ...] | Mapping[str, Any],
        plan: Plan | None = None,
        precision: str | None = None,
        dynamic: Dynamic | None = None,
        micro_batch_rows: int | None = None,
    ) -> RunPlan:
        """Return how a trainer with these arguments would be laid out, and what is expected of its steps.

        Nothing is prepared, and no weights travel: the module may be on the meta device (see `meta_parameters`). As
        many free servers as the plan needs are taken for as long as they measure what is not known of them. Errors as
        of `trainer`.
        """
        from gradwire.run_request import make_plan_request  # imports torch

        request = make_plan_request(
            model, optimizer, plan or Plan(), loss, example, precision, dynamic, micro_batch_rows
        )
        return self._planned(request.message)

    def search_grids(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[..., Any] | nn.Module | None,
        example: tuple[Any, ...] | Mapping[str, Any],
        servers: int,
        plan: Plan | None = None,
        precision: str | None = None,
        dynamic: Dynamic | None = None,
        micro_batch_rows: int | None = None,
    ) -> GridSearch:
        """Return which grid of stages × replicas × tensor for so many servers is expected to be the fastest, and why.

        Every grid that leaves less than half of the servers idle is planned as `plan` does it, out of one export. plan:
        what they have in common. Errors as of `plan`; PlanError if no grid can be carried out.
        """
        from gradwire.grid_search import search_grids
        from gradwire.run_request import make_plan_request  # imports torch

        if isinstance(servers, bool) or not isinstance(servers, int) or servers < 1:
            raise PlanError("servers is not valid", expected="a whole number, 1 or more", got=repr(servers))
        asked = dataclasses.replace(plan or Plan(), stages=1, replicas=1, tensor=1)
        request = make_plan_request(model, optimizer, asked, loss, example, precision, dynamic, micro_batch_rows)
        return search_grids(asked, servers, lambda wanted: self._planned(request.with_plan(wanted)))

    def _planned(self, request: coordinator_pb2.CreateRunRequest) -> RunPlan:
        from gradwire.run_plan import RunPlan

        reply = plan_run(self.channel, self.target, request)
        return RunPlan.from_proto(reply.plan, reply.timeline)

    @contextmanager
    def spare_servers(self, stages: int, parameters: int, busy: Collection[str]) -> Iterator[None]:
        """See to it that so many servers besides the busy ones are there, if this cluster can start any."""
        yield

    def close(self) -> None:
        """End the runs of this cluster's trainers, and close the channel. Idempotent."""
        for trainer in list(self._trainers):
            trainer.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def connect(address: str, tls: TlsFiles | None = None, *, insecure: bool = False) -> Cluster:
    """Connect to the coordinator at HOST:PORT and return its cluster.

    Plaintext is for loopback only; elsewhere give `tls` (or `insecure=True` on a network that you trust). Raises
    Unreachable within 5 s if nobody answers, SettingsError for what is not an address.
    """
    parse_address(address)
    cluster = Cluster(address, tls, insecure=insecure)
    try:
        cluster.status()
    except BaseException:
        cluster.close()
        raise
    return cluster
