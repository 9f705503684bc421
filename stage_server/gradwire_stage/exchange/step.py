"""The exchange of one training step: which bucket starts when, and what becomes of the sums.

Leaves to others: running collectives (`driver.py`), and what stays from step to step (`exchange.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.program import BACKWARD, WEIGHT_GRADIENT, Action
from gradwire_protocol.v1 import run_pb2
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.buckets import Bucket
from gradwire_stage.exchange.collectives import Group, Steps, all_gather, reduce_scatter
from gradwire_stage.exchange.driver import Driver
from gradwire_stage.exchange.reducers import Reducer
from gradwire_stage.exchange.sharding import Parts, Sharding
from gradwire_stage.exchange.statistics import ReplicaBuffers
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

# Buckets that are on their way at once, and thus the bytes that can lie untaken at a replica that is slower.
MOST_OPEN = 4


class StepExchange:
    """Takes the gradients of a step away as backwards finish them, and gives back their sums over the replicas."""

    def __init__(
        self,
        run: RunState,
        timeline: Timeline[Any],
        buckets: Sequence[Bucket],
        reducers: Sequence[Reducer],
        sharding: Sharding | None,
        *,
        entry: int,
        step: run_pb2.TrainStep,
        program: Iterable[Action],
    ) -> None:
        self._run = run
        self._timeline = timeline
        self._buckets = buckets
        self._reducers = reducers
        self._sharding = sharding
        self._train_step = step
        self._driver = Driver(run, timeline, entry)
        # Actions to come that add to the gradients of a stage's parameters; stages with none left are done.
        self._left = Counter(action.stage for action in program if action.kind in (BACKWARD, WEIGHT_GRADIENT))
        # Of each bucket: what still has to be done before it is ready.
        self._stages_left = [set(bucket.stages) for bucket in buckets]
        self._names_left = [set(bucket.names) for bucket in buckets]
        # The stage whose last backward, or second part of one, runs now: each parameter that is added to then has its
        # whole gradient.
        self._last: int | None = None
        # Buckets start in this order at every replica, so that those which are open are the same ones.
        self._next = 0
        self._sums: dict[int, torch.Tensor] = {}
        # Of the parameters whose gradients are on their way, whether there was one here.
        self._had_gradient: dict[str, bool] = {}
        self._flags: list[torch.Tensor] = []
        # Parameters of which some replica has a gradient.
        self._wanted: set[str] = set()

    def before(self, action: Action) -> None:
        """An action begins that may add to gradients."""
        if action.kind in (BACKWARD, WEIGHT_GRADIENT) and self._left[action.stage] == 1:
            self._last = action.stage

    def only(self, names: Collection[str]) -> None:
        """The action that has begun adds to the gradients of these parameters only."""
        if self._last is None:
            return
        for stages, left in zip(self._stages_left, self._names_left, strict=True):
            if stages == {self._last}:
                left.intersection_update(names)
        self._go_on()

    def after(self, action: Action) -> None:
        """An action has ended."""
        self._last = None
        if action.kind in (BACKWARD, WEIGHT_GRADIENT):
            self._left[action.stage] -= 1
            if not self._left[action.stage]:
                for stages in self._stages_left:
                    stages.discard(action.stage)
        self._go_on()

    def accumulated(self, number: int, name: str) -> None:
        """A gradient was added to. In the last backward of the only stage left, it is whole now."""
        if self._last is None or self._stages_left[number] != {self._last}:
            return
        self._names_left[number].discard(name)
        self._go_on()

    def finish(self, buffers: ReplicaBuffers) -> None:
        """Wait for everything."""
        for stages in self._stages_left:
            stages.clear()  # what has no backward in this step is ready, too
        flags = self._own_flags()
        behind = len(self._buckets)
        self._driver.begin(behind, "flags", lambda members: all_gather(members, flags), self._flags.extend)
        micro_batches = self._train_step.micro_batches
        self._driver.begin(
            behind + 1, "buffers", lambda members: buffers.finish(members, micro_batches), lambda _: None
        )
        self._go_on()
        while len(self._driver) or self._next < len(self._buckets):
            self._driver.wait()
            self._go_on()
        self._adopt()

    def gather_weights(self) -> None:
        """Bring the weights together that each replica has updated its part of."""
        parameters = self._run.parameters
        self._gather("weights", lambda kept: kept.detach(), lambda name: parameters[name].detach())

    def gather_gradients(self) -> dict[str, torch.Tensor | None]:
        """Return the gradients whose parts are spread over the replicas, by parameter; None where there is none."""
        if self._sharding is None:
            return {}
        found = {name: torch.zeros_like(self._run.parameters[name].detach()) for name in sorted(self._sharding.names)}
        self._gather(
            "gradients", lambda kept: torch.zeros_like(kept) if kept.grad is None else kept.grad, found.__getitem__
        )
        return {name: gradient if name in self._wanted else None for name, gradient in found.items()}

    def _gather(
        self,
        what: str,
        of_slice: Callable[[torch.nn.Parameter], torch.Tensor],
        whole: Callable[[str], torch.Tensor],
    ) -> None:
        """Write what all replicas have for their slices into contiguous tensors like the parameters."""
        if self._sharding is None:
            return
        self._timeline.switch(phases.ENCODE)
        for number, parts in enumerate(self._sharding.parts):
            if parts is not None:
                while len(self._driver) >= MOST_OPEN:
                    self._driver.wait()
                self._begin_gather(self._sharding, number, parts, what, of_slice, whole)
        self._driver.finish()

    def _go_on(self) -> None:
        previous = self._timeline.switch(phases.ENCODE)
        self._driver.go_on()
        while self._start():
            self._driver.go_on()
        self._timeline.switch(previous)

    def _start(self) -> bool:
        """Start what is ready; return whether there was anything."""
        started = False
        while self._next < len(self._buckets) and len(self._driver) < MOST_OPEN and self._is_ready(self._next):
            self._start_one(self._next)
            self._next += 1
            started = True
        return started

    def _start_one(self, number: int) -> None:
        flat = self._flat(self._buckets[number])
        parts = None if self._sharding is None else self._sharding.parts[number]

        def keep(total: torch.Tensor) -> None:
            self._sums[number] = total

        if self._sharding is None or parts is None:
            # Reducers count steps from 0.
            reducer, step = self._reducers[number], self._train_step.step - 1
            self._driver.begin(number, str(number), lambda members: reducer.all_reduce(members, flat, step), keep)
        else:
            sizes, own = list(parts.sizes), self._sharding.own
            self._driver.begin(number, str(number), lambda members: self._reduce_part(members, flat, sizes, own), keep)

    def _reduce_part(self, members: Group, flat: torch.Tensor, sizes: list[int], own: int) -> Steps[torch.Tensor]:
        """Return the sum of the own part of a bucket."""
        transport = self._run.replica_transport
        if transport is None:
            part = yield from reduce_scatter(members, torch.split(flat, sizes))
            return part
        # torch's backends add up all of it, or parts of one size.
        total = yield from transport.all_reduce(flat)
        return torch.split(total, sizes)[own].clone()

    def _is_ready(self, number: int) -> bool:
        return not self._stages_left[number] or not self._names_left[number]

    def _flat(self, bucket: Bucket) -> torch.Tensor:
        """Take the gradients of a bucket away as one flat tensor; zeros where there is none."""
        parts = []
        for name in bucket.names:
            parameter = self._run.parameters[name]
            gradient, parameter.grad = parameter.grad, None
            self._had_gradient[name] = gradient is not None
            if gradient is None:
                gradient = torch.zeros_like(parameter.detach())
            parts.append(gradient.reshape(-1))
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._run.metrics.exchanged(flat.nbytes)
        return flat

    def _own_flags(self) -> torch.Tensor:
        """Return, of each parameter in order, whether it has a gradient here."""
        parameters = self._run.parameters
        flags = [
            self._had_gradient.get(name, parameters[name].grad is not None)
            for bucket in self._buckets
            for name in bucket.names
        ]
        return torch.tensor(flags, dtype=torch.uint8, device=self._run.device.torch_device)

    def _adopt(self) -> None:
        """Give the parameters, or the own slices, their sums; none to those that no replica has a gradient of."""
        count = sum(len(bucket.names) for bucket in self._buckets)
        for found in self._flags:
            if found.shape != (count,) or found.dtype != torch.uint8:
                raise FrameError(
                    "A replica says of other parameters whether they have gradients",
                    expected=f"{count} bytes",
                    got=f"shape {list(found.shape)}, {found.dtype}",
                )
        some = torch.stack(self._flags).any(dim=0).tolist()
        names = [name for bucket in self._buckets for name in bucket.names]
        self._wanted = {name for name, has_gradient in zip(names, some, strict=True) if has_gradient}
        for number, bucket in enumerate(self._buckets):
            parts = None if self._sharding is None else self._sharding.parts[number]
            total = self._sums.pop(number)
            if self._sharding is None or parts is None:
                for name, shape, part in zip(
                    bucket.names, bucket.shapes, torch.split(total, bucket.sizes), strict=True
                ):
                    self._run.parameters[name].grad = part.view(shape) if name in self._wanted else None
                continue
            for piece in parts.ranges[self._sharding.own]:
                kept = self._sharding.slices[piece.name]
                part = total[piece.offset : piece.offset + piece.size]
                kept.grad = part.view(kept.shape) if piece.name in self._wanted else None

    def _begin_gather(
        self,
        sharding: Sharding,
        number: int,
        parts: Parts,
        what: str,
        of_slice: Callable[[torch.nn.Parameter], torch.Tensor],
        whole: Callable[[str], torch.Tensor],
    ) -> None:
        data_type = self._buckets[number].data_type
        pieces = [of_slice(sharding.slices[piece.name]).reshape(-1) for piece in parts.ranges[sharding.own]]
        # A copy: the weights may be updated again while it is still on its way.
        part = torch.cat([torch.empty(0, dtype=data_type, device=self._run.device.torch_device), *pieces])

        def spread(found: list[torch.Tensor]) -> None:
            for place, (ranges, received) in enumerate(zip(parts.ranges, found, strict=True)):
                if received.shape != (parts.sizes[place],) or received.dtype != data_type:
                    raise FrameError(
                        f"The {what} of the replica at place {place} do not fit",
                        expected=f"{parts.sizes[place]} of {data_type}",
                        got=f"shape {list(received.shape)}, {received.dtype}",
                    )
                for piece in ranges:
                    target = whole(piece.name).view(-1)[piece.first : piece.first + piece.size]
                    target.copy_(received[piece.offset : piece.offset + piece.size])

        self._driver.begin(number, f"{what}{number}", lambda members: all_gather(members, part), spread)
