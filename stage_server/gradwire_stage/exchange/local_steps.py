"""Local steps: replicas train alone for some steps, then agree on what they have learned (DiLoCo).

Each replica divides its gradients by the weight of its own losses and updates its own copy. In the steps that have an
AVERAGE, the way that the weights have gone since the last one is averaged over the replicas, under the run's codec, and
an outer optimizer takes it for a gradient: momentum of Nesterov's kind, as torch.optim.SGD has it (Douillard et al.,
2023). After that all replicas have the same bits. Buffers that training changes are averaged; counters add up.

Leaves to others: running collectives (`driver.py`), and what a codec keeps (`reducers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import InternalError
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.agreement import Agreement, StepEnd
from gradwire_stage.exchange.buckets import Bucket, make_buckets
from gradwire_stage.exchange.collectives import all_reduce
from gradwire_stage.exchange.driver import Driver
from gradwire_stage.exchange.reducers import make_reducers
from gradwire_stage.exchange.step import MOST_OPEN
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


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
        self._codec = codec
        self._rate = settings.learning_rate
        self._momentum = settings.momentum
        self._buckets = make_buckets(segments, run.parameters, split=run.split_names)
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

    def forget(self) -> None:
        self._agreed.clear()
        self._velocities.clear()
        self._agreed_buffers.clear()
        self._reducers = make_reducers(self._run, self._codec, self._buckets)

    def close(self) -> None:
        super().close()
        self.forget()
        self._running = None

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
