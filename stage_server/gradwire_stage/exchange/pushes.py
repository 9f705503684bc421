"""Parameter servers, a stage's side: it pushes gradients, and pulls weights.

A gradient goes to its parameter's server when the last backward that adds to it has ended. With a staleness of k a
stage goes on with weights that lack up to k of the last updates: a replica that is fast may be so many steps ahead of
one that is slow. What changes nothing and reads weights waits until it has them all.

Leaves to others: what becomes of gradients (`parameter_shard.py`), and what travels (`tensor_codes.py`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import InternalError
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_protocol.program import BACKWARD, WEIGHT_GRADIENT, Action
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.agreement import Agreement, StepEnd
from gradwire_stage.exchange.driver import Driver
from gradwire_stage.exchange.feedback import Kept
from gradwire_stage.exchange.statistics import ReplicaBuffers
from gradwire_stage.exchange.tensor_codes import TensorCodes
from gradwire_stage.keys import Key
from gradwire_stage.taking import take_tensor
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


class Pushes(Agreement):
    """Which gradients a stage server owes, and which weights it has still to get."""

    end = StepEnd(reduces=True, updates=False, gathers=True)

    def __init__(
        self, run: RunState, segments: Sequence[stage_pb2.Segment], codec: GradientCodec, staleness: int
    ) -> None:
        super().__init__(run)
        self._codes = TensorCodes(codec)
        self._staleness = staleness
        self._replica_buffers = ReplicaBuffers(segments, run.tensors)
        self.buffers = self._replica_buffers
        self._server_of = {
            name: placement.parameter_server
            for name, placement in run.placements.items()
            if placement.parameter_server and name in run.parameters
        }
        for name in self._server_of:
            del self.updated[name]
        self._stage_of = {
            name: next(stage for stage, server in run.holders[name] if server == run.server) for name in self._server_of
        }
        # The stages that add to each gradient.
        self._stages_of: dict[str, set[int]] = {name: set() for name in self._server_of}
        for segment in segments:
            for use in segment.tensors if segment.graph == graph_pb2.GRAPH_KIND_TRAIN else ():
                if use.tensor in self._stages_of:
                    self._stages_of[use.tensor].add(segment.stage)
        self._residuals: dict[str, Kept] = {}
        # Steps whose weights have not come yet: (entry, step).
        self._owed: deque[tuple[int, int]] = deque()
        self._left: Counter[int] = Counter()
        self._unsent: list[str] = []
        self._running: tuple[Timeline[Any], int, run_pb2.TrainStep] | None = None

    def begin(self, timeline: Timeline[Any], entry: int, step: run_pb2.TrainStep, program: Iterable[Action]) -> None:
        self._running = timeline, entry, step
        self._replica_buffers.begin()
        self._left = Counter(action.stage for action in program if action.kind in (BACKWARD, WEIGHT_GRADIENT))
        self._unsent = list(reversed(self._server_of))

    def after(self, action: Action) -> None:
        """Push what no backward adds to any more."""
        if action.kind in (BACKWARD, WEIGHT_GRADIENT):
            self._left[action.stage] -= 1
            if not self._left[action.stage]:
                open_stages = {stage for stage, count in self._left.items() if count}
                self._push([name for name in self._unsent if not self._stages_of[name] & open_stages])

    def reduce(self) -> None:
        """Push the rest, and agree with other replicas on buffers."""
        timeline, entry, step = self._step()
        self._push(list(self._unsent))
        if len(self._run.places.replica_servers) > 1:
            driver = Driver(self._run, timeline, entry)
            driver.begin(
                0,
                "buffers",
                lambda members: self._replica_buffers.finish(members, step.micro_batches),
                lambda _: None,
            )
            driver.finish()

    def gather(self) -> None:
        """Take the weights of this step, or of one that is not too long ago."""
        timeline, entry, step = self._step()
        self._owed.append((entry, step.step))
        while self._owed and self._owed[0][1] <= step.step - self._staleness:
            self._take_next(timeline)
        # What has come already is newer, and as good.
        while self._owed and self._has_come(self._owed[0][0]):
            self._take_next(timeline)
        self._run.metrics.weights_behind(len(self._owed))

    def settle(self, timeline: Timeline[Any]) -> None:
        while self._owed:
            self._take_next(timeline)

    def forget(self) -> None:
        self._residuals.clear()

    def close(self) -> None:
        super().close()
        self.forget()
        self._running = None

    def _step(self) -> tuple[Timeline[Any], int, run_pb2.TrainStep]:
        if self._running is None:
            raise InternalError("Gradients were pushed before the step began")
        return self._running

    def _push(self, names: Sequence[str]) -> None:
        timeline, entry, _ = self._step()
        timeline.switch(phases.ENCODE)
        run = self._run
        for name in names:
            self._unsent.remove(name)
            parameter = run.parameters[name]
            gradient, parameter.grad = parameter.grad, None
            key = Key(entry, 0, name, pb.DIRECTION_REDUCE, self._stage_of[name], source_member=run.replica)
            payload = None
            if gradient is not None:
                run.metrics.exchanged(gradient.nbytes)
                payload = self._encoded(name, dense(gradient).reshape(-1))
            run.peers.send([self._server_of[name]], key, payload)

    def _encoded(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        if not self._codes.loses(gradient.dtype):
            return gradient
        kept = self._residuals.setdefault(name, Kept()).like(gradient)
        payload, _ = self._codes.encode(gradient + kept, kept)
        return payload

    def _key(self, entry: int, name: str) -> Key:
        server = self._server_of[name]
        return Key(entry, 0, name, pb.DIRECTION_WEIGHTS, self._run.places.first_stages[server])

    def _has_come(self, entry: int) -> bool:
        return all(self._run.mailbox.holds(self._key(entry, name)) for name in self._server_of)

    def _take_next(self, timeline: Timeline[Any]) -> None:
        entry, step = self._owed[0]
        run = self._run
        for name, server in self._server_of.items():
            received = take_tensor(run, timeline, self._key(entry, name))
            if received is None:
                continue  # nobody had a gradient, so it is as it was
            parameter = run.parameters[name].detach()
            made = self._codes.decode(name, received, parameter, f"the parameter server {server}")
            if self._codes.loses(parameter.dtype):
                parameter.add_(made.to(parameter.dtype))
            else:
                parameter.copy_(made)
        self._owed.popleft()
        run.weight_version = step
