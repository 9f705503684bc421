"""Local steps: replicas train alone for some steps, then agree on what they have learned (DiLoCo).

Each replica divides its gradients by the weight of its own losses and updates its own copy. In the steps that have an
AVERAGE, the way that the weights have gone since the last one is averaged over the replicas, under the run's codec, and
an outer optimizer takes it for a gradient: momentum of Nesterov's kind, as torch.optim.SGD has it (Douillard et al.,
2023). After that all replicas have the same bits. Buffers that training changes are averaged; counters add up.

A checkpoint has the weights and the optimizer's state of the first replica, as if it were the only one. Besides, for
runs of this kind, it has what the others have in their place, and what all agreed on last; but not of buffers.

Leaves to others: running collectives (`driver.py`), and what a codec keeps (`reducers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import FrameError, InternalError
from gradwire_protocol.exchange_state import LOCAL_PREFIX
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.agreement import Agreement, StepEnd
from gradwire_stage.exchange.buckets import Bucket, make_buckets
from gradwire_stage.exchange.collectives import all_reduce
from gradwire_stage.exchange.driver import Driver
from gradwire_stage.exchange.reducers import make_reducers, restore_tensors, state_of_tensor, tensors_of
from gradwire_stage.exchange.step import MOST_OPEN
from gradwire_stage.optimizer import StateValue
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


# In checkpoints. What all have, the leader gives.
_AGREED, _VELOCITY = f"{LOCAL_PREFIX}agreed", f"{LOCAL_PREFIX}velocity"
_WEIGHT = f"{LOCAL_PREFIX}weight"
_OF_CODEC, _OF_OPTIMIZER = f"{LOCAL_PREFIX}codec.", f"{LOCAL_PREFIX}optimizer."


class LocalSteps(Agreement):
    """The weights that replicas agreed on last, and the outer optimizer."""

    end = StepEnd(averages=True)

    def __init__(
        self,
        run: RunState,
        segments: Sequence[stage_pb2.Segment],
        codec: GradientCodec,
        settings: stage_pb2.LocalSteps,
    ) -> None:
        super().__init__(run)
        # Shards lose something else each: what one of them owes is of no use to another layout.
        self.owes = run.places.shards == 1
        self._codec = codec
        self._rate = settings.learning_rate
        self._momentum = settings.momentum
        # What several stages hold is to be the same there after an average, to the last bit, whatever else they hold.
        self._buckets = make_buckets(segments, run.parameters, alone=run.tied_names, split=run.split_names)
        self._places = {
            name: (number, place)
            for number, bucket in enumerate(self._buckets)
            for place, name in enumerate(bucket.names)
        }
        trained = [segment for segment in segments if segment.graph == graph_pb2.GRAPH_KIND_TRAIN]
        changing = dict.fromkeys(name for segment in trained for name in segment.mutated_tensors)
        changing |= dict.fromkeys(update.tensor for segment in trained for update in segment.buffer_updates)
        self._changing = [name for name in changing if name in run.tensors]
        self._agreed: list[torch.Tensor] = []
        self._agreed_buffers: dict[str, torch.Tensor] = {}
        self._velocities: list[torch.Tensor] = []
        self._running: tuple[Timeline[Any], int, run_pb2.TrainStep] | None = None
        self.forget()

    def begin(self, timeline: Timeline[Any], entry: int, step: run_pb2.TrainStep, program: Iterable[Action]) -> None:
        """The first step begins with weights that all replicas have."""
        self._running = timeline, entry, step
        if not self._agreed:
            self._agreed = [self._flat(bucket) for bucket in self._buckets]
            self._velocities = [torch.zeros_like(flat) for flat in self._agreed]
            self._agreed_buffers = {name: self._run.tensors[name].clone() for name in self._changing}

    def average(self) -> None:
        if self._running is None:
            raise InternalError("Weights were averaged before the step began")
        timeline, entry, step = self._running
        timeline.switch(phases.ENCODE)
        driver = Driver(self._run, timeline, entry)
        for number, bucket in enumerate(self._buckets):
            while len(driver) >= MOST_OPEN:
                driver.wait()
            self._begin_bucket(driver, number, bucket, step.step)
        for number, name in enumerate(self._changing, start=len(self._buckets)):
            while len(driver) >= MOST_OPEN:
                driver.wait()
            self._begin_buffer(driver, number, name)
        driver.finish()

    def owed(self, name: str) -> dict[str, StateValue]:
        if name not in self._places or not self._agreed:
            return {}
        number, place = self._places[name]
        bucket, parameter = self._buckets[number], self._run.parameters[name].detach()
        agreed, velocity = (
            torch.split(flats[number], bucket.sizes)[place].view(parameter.shape)
            for flats in (self._agreed, self._velocities)
        )
        of_codec = state_of_tensor(self._reducers[number], place, bucket.shapes)
        found: dict[str, StateValue] = {f"{_OF_CODEC}{what}": value for what, value in of_codec.items()}
        if self._run.places.leads:
            return found | {_AGREED: agreed, _VELOCITY: velocity}
        if not torch.equal(parameter, agreed):
            found[_WEIGHT] = parameter
        return found | {f"{_OF_OPTIMIZER}{key}": value for key, value in self._run.optimizer.state_of(name).items()}

    def takes(self, name: str, replica: int, what: str) -> bool:
        # All that hold a parameter take what one of them gave.
        is_own = replica == self._run.replica or what in (_AGREED, _VELOCITY)
        return self.owes and is_own and what.startswith(LOCAL_PREFIX)

    def owe(self, states: Mapping[str, Mapping[str, StateValue]]) -> None:
        kept = {name: self._fitting(name, tensors_of(states.get(name, {}))) for name in self._places}
        if not any(_AGREED in of_one for of_one in kept.values()):
            return
        # Until its own are there, the weights are the leader's.
        weights = {name: self._run.parameters[name].detach() for name in kept}
        for bucket, reducer in zip(self._buckets, self._reducers, strict=True):
            agreed = [kept[name].get(_AGREED, weights[name]) for name in bucket.names]
            velocities = [kept[name].get(_VELOCITY, torch.zeros_like(weights[name])) for name in bucket.names]
            self._agreed.append(torch.cat([tensor.reshape(-1) for tensor in agreed]))
            self._velocities.append(torch.cat([tensor.reshape(-1) for tensor in velocities]))
            of_codec = [tensors_of(kept[name], _OF_CODEC) for name in bucket.names]
            if any(of_codec):
                restore_tensors(reducer, of_codec, bucket.shapes, agreed[0])
        self._agreed_buffers = {name: self._run.tensors[name].clone() for name in self._changing}
        if not self._run.places.leads:
            self._restore_own(weights, kept, states)

    def _restore_own(
        self,
        weights: Mapping[str, torch.Tensor],
        kept: Mapping[str, Mapping[str, torch.Tensor]],
        states: Mapping[str, Mapping[str, StateValue]],
    ) -> None:
        """Put what this replica had in the place of what the leader had."""
        for name, weight in weights.items():
            # Not kept where it was what all had agreed on.
            weight.copy_(kept[name].get(_WEIGHT, kept[name].get(_AGREED, weight)))
        optimizer = self._run.optimizer
        optimizer.restore(
            {name: _of_optimizer(states.get(name, {})) or optimizer.state_of(name) for name in self._run.parameters}
        )

    def forget(self) -> None:
        self._agreed.clear()
        self._velocities.clear()
        self._agreed_buffers.clear()
        self._reducers = make_reducers(self._run, self._codec, self._buckets)

    def close(self) -> None:
        super().close()
        self.forget()
        self._running = None

    def _fitting(self, name: str, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what a checkpoint has of a parameter, on its device; FrameError if it does not fit it."""
        parameter = self._run.parameters[name]
        for what in (_AGREED, _VELOCITY, _WEIGHT):
            value = kept.get(what, parameter)
            if (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
                raise FrameError(
                    f"What came for {name!r}, {what}, does not fit it",
                    expected=f"shape {list(parameter.shape)}, {parameter.dtype}",
                    got=f"shape {list(value.shape)}, {value.dtype}",
                )
        return {what: value.to(parameter.device) for what, value in kept.items()}

    def _flat(self, bucket: Bucket) -> torch.Tensor:
        """Return a copy of the weights of a bucket."""
        return torch.cat([self._run.parameters[name].detach().reshape(-1) for name in bucket.names])

    def _begin_bucket(self, driver: Driver, number: int, bucket: Bucket, step: int) -> None:
        way = self._agreed[number] - self._flat(bucket)
        self._run.metrics.exchanged(way.nbytes)

        def take(total: torch.Tensor) -> None:
            mean = total / len(self._run.places.replica_servers)
            velocity = self._velocities[number].mul_(self._momentum).add_(mean)
            agreed = self._agreed[number].sub_(mean.add_(velocity, alpha=self._momentum), alpha=self._rate)
            for name, part in zip(bucket.names, torch.split(agreed, bucket.sizes), strict=True):
                parameter = self._run.parameters[name].detach()
                parameter.copy_(part.view(parameter.shape))

        driver.begin(
            number, f"way{number}", lambda members: self._reducers[number].all_reduce(members, way, step - 1), take
        )

    def _begin_buffer(self, driver: Driver, number: int, name: str) -> None:
        now, agreed = self._run.tensors[name], self._agreed_buffers[name]
        # What counts, counts what all have done; what estimates, estimates the same.
        averages = now.is_floating_point() or now.is_complex()
        own = now if averages else now - agreed

        def take(total: torch.Tensor) -> None:
            made = total / len(self._run.places.replica_servers) if averages else agreed.reshape(-1) + total
            # Another tensor: versions that passes may hold are not written to.
            self._run.tensors[name] = made.to(now.dtype).view(now.shape)
            self._agreed_buffers[name] = self._run.tensors[name].clone()

        driver.begin(number, f"buffer{number}", lambda members: all_reduce(members, own.reshape(-1)), take)


def _of_optimizer(state: Mapping[str, StateValue]) -> dict[str, StateValue]:
    """Return the values of an optimizer's state, by torch's names."""
    return {what.removeprefix(_OF_OPTIMIZER): value for what, value in state.items() if what.startswith(_OF_OPTIMIZER)}
