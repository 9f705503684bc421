"""Parameter servers, their own side: the parameters of one, and what stages push to it and pull from it.

It adds up what all replicas and all tied copies push, in their order; division, clipping and update are a step's own
(`gradients.py`); then the weights go to all who hold a copy. Under a codec, what is encoded is the way from the weights
that holders have to those that the optimizer has, so that all holders have the same bits, and never fall behind for
good.

Leaves to others: when stages push and pull (`pushes.py`), and what travels (`tensor_codes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from gradwire_protocol.errors import InternalError
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_protocol.program import Action
from gradwire_protocol.v1 import run_pb2, stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.exchange.agreement import Agreement, StepEnd
from gradwire_stage.exchange.feedback import work_type
from gradwire_stage.exchange.tensor_codes import TensorCodes
from gradwire_stage.keys import Key
from gradwire_stage.taking import take_tensor
from gradwire_stage.timeline import Timeline

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


class ParameterShard(Agreement):
    """The parameters of one parameter server."""

    end = StepEnd(reduces=True, gathers=True)

    def __init__(self, run: RunState, request: stage_pb2.PrepareRequest, codec: GradientCodec) -> None:
        super().__init__(run)
        self._codes = TensorCodes(codec)
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
        # Parameters that have a gradient in this step.
        self._moving: set[str] = set()
        self._running: tuple[Timeline[Any], int] | None = None

    def begin(self, timeline: Timeline[Any], entry: int, step: run_pb2.TrainStep, program: Iterable[Action]) -> None:
        self._running = timeline, entry
        self._moving.clear()

    def reduce(self) -> None:
        """Add up what all replicas push."""
        timeline, entry = self._step()
        run = self._run
        for name, parameter in run.parameters.items():
            total: torch.Tensor | None = None
            for replica, stage in self._pushers[name]:
                key = Key(entry, 0, name, pb.DIRECTION_REDUCE, stage, source_member=replica)
                received = take_tensor(run, timeline, key)
                if received is None:
                    continue
                timeline.switch(phases.UPDATE)
                part = self._codes.decode(name, received, parameter, f"stage {stage} of replica {replica}")
                # A copy of the first: received memory is read-only.
                total = part.to(parameter.dtype, copy=True) if total is None else total.add_(part)
            parameter.grad = total
            if total is not None:
                self._moving.add(name)

    def before_update(self) -> None:
        """Holders have the weights as they are now, if nothing else is known of them."""
        for name, parameter in self._run.parameters.items():
            if self._codes.loses(parameter.dtype) and name not in self._seen:
                self._seen[name] = parameter.detach().clone()

    def gather(self) -> None:
        """Send the weights to all who hold them."""
        timeline, entry = self._step()
        timeline.switch(phases.ENCODE)
        run = self._run
        for name, parameter in run.parameters.items():
            key = Key(entry, 0, name, pb.DIRECTION_WEIGHTS, run.first_stage)
            run.peers.send(self._readers[name], key, self._sent(name, parameter.detach()))

    def forget(self) -> None:
        """Holders have been given other weights: the ones that are here."""
        self._seen.clear()

    def close(self) -> None:
        super().close()
        self.forget()
        self._running = None

    def _step(self) -> tuple[Timeline[Any], int]:
        if self._running is None:
            raise InternalError("A parameter server was asked for weights before the step began")
        return self._running

    def _sent(self, name: str, weights: torch.Tensor) -> torch.Tensor | None:
        if name not in self._moving:
            return None
        if not self._codes.loses(weights.dtype):
            # A copy: they may be updated again while it is on its way.
            return weights.clone().reshape(-1)
        seen = self._seen[name]
        payload, made = self._codes.encode((weights - seen).reshape(-1).to(work_type(weights.dtype)))
        seen.add_(made.view(seen.shape).to(seen.dtype))
        return payload
