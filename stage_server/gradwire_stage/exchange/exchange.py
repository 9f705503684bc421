"""The exchange of gradients between the replicas of a server, beside the last backwards of a step.

A bucket of gradients starts as soon as no backward adds to them any more: its collective (`collectives.py`) then makes
progress whenever the compute thread comes by, between two actions and between two parameters of the last backward. What
is left when the step has nothing else to do is waited for. So there is no thread beside the compute thread, and sends,
which have streams and threads of their own, never hold up an activation.

Leaves to others: one step of it (`step.py`), how members come to agree (`reducers.py`), and the division by the total
weight (`gradients.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import InternalError
from gradwire_protocol.exchange_state import LOCAL_PREFIX
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_stage.exchange.agreement import Agreement, StepEnd
from gradwire_stage.exchange.buckets import make_buckets
from gradwire_stage.exchange.reducers import make_reducers, restore_tensors, state_of_tensor, tensors_of
from gradwire_stage.exchange.sharding import Sharding
from gradwire_stage.exchange.statistics import ReplicaBuffers
from gradwire_stage.exchange.step import StepExchange
from gradwire_stage.optimizer import StateValue
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


class ReplicaExchange(Agreement):
    """Makes the replicas of this server agree on gradients, step after step.

    Under a lossy codec it keeps from step to step what was lost (error feedback).
    """

    def __init__(
        self,
        run: RunState,
        segments: Sequence[stage_pb2.Segment],
        codec: GradientCodec,
        *,
        shard: bool,
        whole: bool,
    ) -> None:
        """shard: the optimizer's state; whole: it needs whole parameters for that."""
        super().__init__(run)
        self.end = StepEnd(reduces=True, gathers=shard)
        self._codec = codec
        # Shards lose something else each: what one of them owes is of no use to another layout.
        self.owes = codec.lossy and run.places.shards == 1
        self._buckets = make_buckets(segments, run.parameters, tied=run.tied_names, split=run.split_names)
        # Where each replica updates a part of the parameters only; None: all of them.
        self._sharding: Sharding | None = None
        if shard:
            places = list(run.places.replica_servers)
            sharding = Sharding(
                self._buckets, run.parameters, places=len(places), own=places.index(run.replica), whole=whole
            )
            self._sharding, self._buckets = sharding, sharding.buckets
            self.shared = sharding.names
            whole_ones = {name: tensor for name, tensor in self.updated.items() if name not in sharding.names}
            self.updated = {**whole_ones, **sharding.slices}
        self._reducers = make_reducers(run, codec, self._buckets)
        self._replica_buffers = ReplicaBuffers(segments, run.tensors)
        self.buffers = self._replica_buffers
        self._bucket_of = {name: number for number, bucket in enumerate(self._buckets) for name in bucket.names}
        self._name_of = {run.parameters[name]: name for name in self._bucket_of}
        self._step: StepExchange | None = None
        self._hooks = [
            # Called whenever autograd has added to a parameter's gradient.
            run.parameters[name].register_post_accumulate_grad_hook(partial(self._accumulated, name))  # type: ignore[no-untyped-call]
            for name in self._bucket_of
        ]

    def begin(self, timeline: Timeline[Any], entry: int, step: run_pb2.TrainStep, program: Iterable[Action]) -> None:
        if self._run.replica_transport is not None and self._buckets:
            # Here nobody waits for this server elsewhere.
            self._run.replica_transport.meet()
        self._replica_buffers.begin()
        self._step = StepExchange(
            *(self._run, timeline, self._buckets, self._reducers, self._sharding),
            entry=entry,
            step=step,
            program=program,
        )

    def before(self, action: Action) -> None:
        self._running.before(action)

    def left_to_add(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._running.only({self._name_of[parameter] for parameter in parameters if parameter in self._name_of})

    def added(self, parameter: torch.nn.Parameter) -> None:
        name = self._name_of.get(parameter)
        if name is not None:
            self._running.accumulated(self._bucket_of[name], name)

    def after(self, action: Action) -> None:
        """Start what is ready by the action, and go on with what can."""
        self._running.after(action)

    def reduce(self) -> None:
        """Wait for everything; the sums of the replicas' gradients are there then."""
        self._running.finish(self._replica_buffers)

    def gather(self) -> None:
        self._running.gather_weights()

    def whole_gradients(self) -> dict[str, torch.Tensor | None]:
        return self._running.gather_gradients()

    def counts(self, name: str) -> bool:
        # Where replicas share the norm, what all of them update counts at one of them.
        counts_here = self._sharding is None or name in self.shared or self._run.places.leads
        return self._run.owns(name) and counts_here

    def own_state(self, name: str, value: StateValue) -> StateValue | None:
        if self._sharding is None or name not in self.shared:
            return super().own_state(name, value)
        return self._sharding.own_state(name, self._run.parameters[name], value)

    def owed(self, name: str) -> dict[str, StateValue]:
        number = self._bucket_of.get(name)
        if number is None:
            return {}
        bucket = self._buckets[number]
        return dict(state_of_tensor(self._reducers[number], bucket.names.index(name), bucket.shapes))

    def takes(self, name: str, replica: int, what: str) -> bool:
        # It is from the first of a pipeline that holds the parameter, and that one's again.
        is_own = replica == self._run.replica and self._run.owns(name)
        return self.owes and is_own and not what.startswith(LOCAL_PREFIX)

    def owe(self, states: Mapping[str, Mapping[str, StateValue]]) -> None:
        for bucket, reducer in zip(self._buckets, self._reducers, strict=True):
            own = [tensors_of(states.get(name, {})) for name in bucket.names]
            if any(own):
                restore_tensors(reducer, own, bucket.shapes, self._run.parameters[bucket.names[0]].detach())

    def forget(self) -> None:
        self._reducers = make_reducers(self._run, self._codec, self._buckets)

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._name_of.clear()
        self._reducers.clear()
        self._step = None
        self._sharding = None

    @property
    def _running(self) -> StepExchange:
        if self._step is None:
            raise InternalError("The exchange of a step was used before the step began")
        return self._step

    def _accumulated(self, name: str, _: torch.Tensor) -> None:
        if self._step is not None:
            self._step.accumulated(self._bucket_of[name], name)
