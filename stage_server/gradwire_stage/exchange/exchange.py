"""The exchange of gradients between the replicas of a server, beside the last backwards of a step.

A bucket of gradients starts as soon as no backward adds to them any more: its collective (`collectives.py`) then makes
progress whenever the compute thread comes by, between two actions and between two parameters of the last backward. What
is left when the step has nothing else to do is waited for. So there is no thread beside the compute thread, and sends,
which have streams and threads of their own, never hold up an activation.

Leaves to others: one step of it (`step.py`), how members come to agree (`reducers.py`), and the division by the total
weight (`gradients.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import InternalError
from gradwire_protocol.gradient_codecs import GradientCodec, parse_compression
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_stage.exchange.buckets import make_buckets
from gradwire_stage.exchange.reducers import Reducer, make_reducer
from gradwire_stage.exchange.sharding import Sharding
from gradwire_stage.exchange.statistics import ReplicaBuffers
from gradwire_stage.exchange.step import StepExchange
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


class ReplicaExchange:
    """Makes the replicas of this server agree on gradients, step after step. For the compute thread.

    Under a lossy codec it keeps from step to step what was lost (error feedback). `sharding`: where each replica
    updates a part of the parameters only; None: all of them.
    """

    def __init__(
        self,
        segments: Sequence[stage_pb2.Segment],
        run: RunState,
        codec: GradientCodec,
        *,
        shard: bool,
        whole: bool,
    ) -> None:
        """shard: the optimizer's state; whole: it needs whole parameters for that."""
        self._run = run
        self._codec = codec
        tied = {name for name, holders in run.holders.items() if len(holders) > 1}
        self._buckets = make_buckets(segments, run.parameters, tied=tied)
        self.sharding: Sharding | None = None
        if shard:
            places = list(run.places.replica_servers)
            self.sharding = Sharding(
                self._buckets, run.parameters, places=len(places), own=places.index(run.replica), whole=whole
            )
            self._buckets = self.sharding.buckets
        self._reducers = self._make_reducers()
        self.buffers = ReplicaBuffers(segments, run.tensors)
        self._bucket_of = {name: number for number, bucket in enumerate(self._buckets) for name in bucket.names}
        self._step: StepExchange | None = None
        self._hooks = [
            # Called whenever autograd has added to a parameter's gradient.
            run.parameters[name].register_post_accumulate_grad_hook(partial(self._accumulated, name))  # type: ignore[no-untyped-call]
            for name in self._bucket_of
        ]

    def begin(self, timeline: Timeline[Any], entry: int, step: run_pb2.TrainStep, program: Iterable[Action]) -> None:
        """A training step begins."""
        self.buffers.begin()
        self._step = StepExchange(
            *(self._run, timeline, self._buckets, self._reducers, self.sharding),
            entry=entry,
            step=step,
            program=program,
        )

    def before(self, action: Action) -> None:
        """An action begins that may add to gradients."""
        self._running.before(action)

    def after(self, action: Action) -> None:
        """An action has ended: start what is ready by it, and go on with what can."""
        self._running.after(action)

    def finish(self) -> None:
        """Wait for everything; the sums of the replicas' gradients are there then. For REDUCE."""
        self._running.finish(self.buffers)

    def gather_weights(self) -> None:
        """Bring together what each replica has updated. For GATHER."""
        self._running.gather_weights()

    def gather_gradients(self) -> dict[str, torch.Tensor | None]:
        """Return the whole gradients of the parameters that replicas share, by name."""
        return self._running.gather_gradients()

    def forget(self) -> None:
        """Let go of what was kept from step to step: another state has been loaded."""
        self._reducers = self._make_reducers()

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._reducers.clear()
        self._step = None
        self.sharding = None

    @property
    def _running(self) -> StepExchange:
        if self._step is None:
            raise InternalError("The exchange of a step was used before the step began")
        return self._step

    def _make_reducers(self) -> list[Reducer]:
        exact = parse_compression("none")
        return [
            make_reducer(self._codec if bucket.data_type.is_floating_point else exact, bucket.shapes)
            for bucket in self._buckets
        ]

    def _accumulated(self, name: str, _: torch.Tensor) -> None:
        if self._step is not None:
            self._step.accumulated(self._bucket_of[name], name)
