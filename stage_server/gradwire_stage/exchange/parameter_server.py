"""Parameter servers: stages push gradients to those who hold the weights and the optimizer, and pull weights back.

Every trained parameter is at one parameter server, which adds up what all replicas and all tied copies push, divides by
the total weight, updates, and sends the weights to all who hold a copy. Under a codec, pushes and pulls are encoded
alike, with error feedback: of a pull, what is encoded is the way from the weights that holders have to those that the
optimizer has, so that all holders have the same bits, and never fall behind for good.

With a staleness of k, a stage goes on with weights that lack up to k of the last updates: a replica that is fast may be
so many steps ahead of one that is slow. What changes nothing and reads weights waits until it has them all.

Leaves to others: what a codec does (`encoded_ring.py`), division, clipping and updates (`gradients.py`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import FrameError, PlanError
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_protocol.program import BACKWARD, WEIGHT_GRADIENT, Action
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.driver import Driver
from gradwire_stage.exchange.encoded_ring import ElementCodec
from gradwire_stage.exchange.feedback import Kept, keep_difference, work_type
from gradwire_stage.exchange.half import BF16, FP16
from gradwire_stage.exchange.int8 import INT8
from gradwire_stage.exchange.statistics import ReplicaBuffers
from gradwire_stage.keys import Key
from gradwire_stage.taking import take_tensor
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState

_CODECS: Mapping[str, ElementCodec | None] = {"none": None, "fp16": FP16, "bf16": BF16, "int8": INT8}


class _Coder:
    """Encodes what is sent to parameter servers and by them, tensor by tensor."""

    def __init__(self, codec: GradientCodec) -> None:
        if codec.name not in _CODECS:
            raise PlanError(
                "Parameter servers cannot work with this codec",
                expected=" or ".join(map(repr, _CODECS)),
                got=repr(str(codec)),
                remedy='use exchange="ring" for it',
            )
        self._codec = _CODECS[codec.name]

    def encode(self, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what travels, and what its receiver makes of it. wanted: flat, in the work type or of no codec."""
        codec = self._for(wanted.dtype)
        if codec is None or not wanted.numel():
            return wanted, wanted
        payload = codec.encode(wanted)
        return payload, codec.decode(payload, wanted.dtype)

    def decode(self, name: str, received: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return what was encoded, in the shape of a parameter; FrameError for what is not of its size."""
        codec = self._for(like.dtype)
        expected = like.numel()
        if codec is not None and expected:
            sample = codec.encode(like.new_zeros(expected, dtype=work_type(like.dtype)))
            fits = received.dtype == torch.uint8 and received.shape == sample.shape
            decoded = codec.decode(received, work_type(like.dtype)) if fits else received
        else:
            decoded = received
            fits = received.dtype == like.dtype and received.numel() == expected
        if not fits:
            raise FrameError(
                f"What came for the parameter {name!r} does not fit it",
                expected=f"{expected} elements of {like.dtype}, as encoded",
                got=f"shape {list(received.shape)}, {received.dtype}",
            )
        return decoded.view(like.shape)

    def _for(self, data_type: torch.dtype) -> ElementCodec | None:
        codec = self._codec
        is_smaller = codec is not None and data_type.is_floating_point and data_type.itemsize > codec.element_bytes
        return codec if is_smaller else None

    def loses(self, data_type: torch.dtype) -> bool:
        """Whether tensors of a type are encoded."""
        return self._for(data_type) is not None


class Pushes:
    """A stage server's side: which gradients it owes, and which weights it has still to get. For the compute thread."""

    def __init__(
        self,
        segments: Sequence[stage_pb2.Segment],
        run: RunState,
        codec: GradientCodec,
        staleness: int,
    ) -> None:
        self._run = run
        self._coder = _Coder(codec)
        self._staleness = staleness
        self.buffers = ReplicaBuffers(segments, run.tensors)
        self._server_of = {
            name: placement.parameter_server
            for name, placement in run.placements.items()
            if placement.parameter_server and name in run.parameters
        }
        self._stage_of = {
            name: next(stage for stage, server in run.holders[name] if server == run.server) for name in self._server_of
        }
        # Names by the stages that add to their gradients.
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

    def begin(self, program: Iterable[Action]) -> None:
        """A training step begins."""
        self.buffers.begin()
        self._left = Counter(action.stage for action in program if action.kind in (BACKWARD, WEIGHT_GRADIENT))
        self._unsent = list(reversed(self._server_of))

    def after(self, timeline: Timeline[Any], entry: int, action: Action) -> None:
        """An action has ended: push what no backward adds to any more."""
        if action.kind in (BACKWARD, WEIGHT_GRADIENT):
            self._left[action.stage] -= 1
            if not self._left[action.stage]:
                open_stages = {stage for stage, count in self._left.items() if count}
                self._push(timeline, entry, [n for n in self._unsent if not self._stages_of[n] & open_stages])

    def finish(self, timeline: Timeline[Any], entry: int, micro_batches: Sequence[run_pb2.MicroBatch]) -> None:
        """Push the rest, and agree with other replicas on buffers. For REDUCE."""
        self._push(timeline, entry, list(self._unsent))
        if len(self._run.places.replica_servers) > 1:
            driver = Driver(self._run, timeline, entry)
            driver.begin(0, "buffers", lambda members: self.buffers.finish(members, micro_batches), lambda _: None)
            driver.finish()

    def pull(self, timeline: Timeline[Any], entry: int, step: int) -> None:
        """Take the weights of this step, or of one that is not too long ago. For GATHER."""
        self._owed.append((entry, step))
        while self._owed and self._owed[0][1] <= step - self._staleness:
            self._take_next(timeline)
        # What has come already is newer, and as good.
        while self._owed and self._has_come(self._owed[0][0]):
            self._take_next(timeline)
        self._run.metrics.weights_behind(len(self._owed))

    def settle(self, timeline: Timeline[Any]) -> None:
        """Take all weights that are still to come."""
        while self._owed:
            self._take_next(timeline)

    def forget(self) -> None:
        """Let go of what was kept from step to step: another state has been loaded."""
        self._residuals.clear()

    def _push(self, timeline: Timeline[Any], entry: int, names: Sequence[str]) -> None:
        timeline.switch(phases.ENCODE)
        run = self._run
        for name in names:
            self._unsent.remove(name)
            parameter = run.parameters[name]
            gradient, parameter.grad = parameter.grad, None
            key = Key(entry, 0, name, pb.DIRECTION_REDUCE, self._stage_of[name], source_replica=run.replica)
            payload = None if gradient is None else self._encoded(name, dense(gradient))
            if gradient is not None:
                run.metrics.exchanged(gradient.nbytes)
            run.peers.send([self._server_of[name]], key, payload)

    def _encoded(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        if not self._coder.loses(gradient.dtype):
            return gradient.reshape(-1)
        kept = self._residuals.setdefault(name, Kept()).like(gradient)
        wanted = gradient.reshape(-1) + kept
        payload, sent = self._coder.encode(wanted)
        keep_difference(wanted, sent, kept)
        return payload

    def _key(self, entry: int, name: str) -> Key:
        server = self._server_of[name]
        return Key(entry, 0, name, pb.DIRECTION_WEIGHTS, self._run.places.first_stages[server])

    def _has_come(self, entry: int) -> bool:
        return all(self._run.mailbox.holds(self._key(entry, name)) for name in self._server_of)

    def _take_next(self, timeline: Timeline[Any]) -> None:
        entry, step = self._owed[0]
        run = self._run
        for name in self._server_of:
            received = take_tensor(run, timeline, self._key(entry, name))
            parameter = run.parameters[name].detach()
            if received is None:
                continue  # nobody had a gradient, so it is as it was
            made = self._coder.decode(name, received, parameter)
            if self._coder.loses(parameter.dtype):
                parameter.add_(made.to(parameter.dtype))
            else:
                parameter.copy_(made)
        self._owed.popleft()
        run.weight_version = step


class ParameterShard:
    """A parameter server's side: takes what is pushed, and sends what was updated. For the compute thread."""

    def __init__(self, run: RunState, request: stage_pb2.PrepareRequest, codec: GradientCodec) -> None:
        self._run = run
        self._coder = _Coder(codec)
        workers = [peer for peer in request.peers if not peer.parameter_server]
        # Who pushes a tensor, in the order in which it is added up: (replica, stage), and who gets it.
        self._pushers: dict[str, list[tuple[int, int]]] = {}
        self._readers: dict[str, list[str]] = {}
        for name, placement in run.placements.items():
            holders = {
                (peer.replica, min(own)): peer.server
                for peer in workers
                if (own := set(peer.stages) & set(placement.holder_stages))
            }
            self._pushers[name] = sorted(holders)
            self._readers[name] = [holders[place] for place in self._pushers[name]]
        # Under a codec: the weights that the holders have.
        self._seen: dict[str, torch.Tensor] = {}
        self._updated: set[str] = set()

    def collect(self, timeline: Timeline[Any], entry: int) -> None:
        """Add up what all replicas push. For REDUCE."""
        run = self._run
        self._updated.clear()
        for name, parameter in run.parameters.items():
            total: torch.Tensor | None = None
            for replica, stage in self._pushers[name]:
                key = Key(entry, 0, name, pb.DIRECTION_REDUCE, stage, source_replica=replica)
                received = take_tensor(run, timeline, key)
                if received is None:
                    continue
                timeline.switch(phases.UPDATE)
                part = self._coder.decode(name, received, parameter)
                # A copy of the first: received memory is read-only.
                total = part.to(parameter.dtype, copy=True) if total is None else total.add_(part)
            parameter.grad = total
            if total is not None:
                self._updated.add(name)

    def spread(self, timeline: Timeline[Any], entry: int) -> None:
        """Send the weights to all who hold them. For GATHER."""
        timeline.switch(phases.ENCODE)
        run = self._run
        for name, parameter in run.parameters.items():
            key = Key(entry, 0, name, pb.DIRECTION_WEIGHTS, run.first_stage)
            run.peers.send(self._readers[name], key, self._sent(name, parameter.detach()))

    def forget(self) -> None:
        """Holders have been given other weights: the ones that are here."""
        self._seen.clear()

    def before_update(self) -> None:
        """The weights are about to change: holders have what they are now, if nothing else is known."""
        for name, parameter in self._run.parameters.items():
            if self._coder.loses(parameter.dtype) and name not in self._seen:
                self._seen[name] = parameter.detach().clone()

    def _sent(self, name: str, weights: torch.Tensor) -> torch.Tensor | None:
        if name not in self._updated:
            return None
        if not self._coder.loses(weights.dtype):
            # A copy: they may be updated again while it is on its way.
            return weights.clone().reshape(-1)
        seen = self._seen[name]
        payload, made = self._coder.encode((weights - seen).reshape(-1).to(work_type(weights.dtype)))
        seen.add_(made.view(seen.shape).to(seen.dtype))
        return payload
