"""What happens to gradients between the last backward of a step and the next step: REDUCE, NORM, UPDATE.

Gradients add up as sums over the batch, and are divided once by the total weight of the loss.
"""

from __future__ import annotations

from typing import Any

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.torch_tensors import dense
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.group.tensor_group import TensorGroup
from gradwire_stage.group.whole import WholeTensors
from gradwire_stage.keys import Key
from gradwire_stage.passes import Passes, put_result
from gradwire_stage.run_state import RunState
from gradwire_stage.taking import take_tensor
from gradwire_stage.timeline import Timeline

# What torch.nn.utils.clip_grad_norm_ adds to the norm before it divides.
_CLIP_EPSILON = 1e-6


class Gradients:
    """The actions of one training step that concern the step as a whole. For the compute thread."""

    def __init__(
        self, run: RunState, timeline: Timeline[Any], passes: Passes, *, entry: int, step: run_pb2.TrainStep
    ) -> None:
        self._run = run
        self._timeline = timeline
        self._passes = passes
        self._entry = entry
        self._step = step
        self._divided = False
        self._weight_sent = False
        self._norm: torch.Tensor | None = None

    def send_weight(self) -> None:
        """Send the weight of this replica's losses to all other servers, once it is known here.

        Before the first action, which is when a replica without micro-batches knows, and after each forward of the last
        stage.
        """
        run = self._run
        if (
            self._weight_sent
            or run.loss_form != graph_pb2.LOSS_FORM_SUM_AND_WEIGHT
            or run.server != run.places.last_server
        ):
            return
        weight = self._passes.own_weight()
        if weight is not None:
            key = Key(self._entry, 0, "", pb.DIRECTION_WEIGHT, run.places.last_stage, source_member=run.replica)
            run.peers.send(run.places.weight_readers, key, weight)
            self._weight_sent = True

    def reduce(self) -> None:
        """Add the gradients of all replicas, then of tensors that several servers hold, in stage order.

        The same bits everywhere.
        """
        run, timeline = self._run, self._timeline
        run.agreement.reduce()
        timeline.switch(phases.ENCODE)
        tied = [(name, holders) for name in run.agreement.updated if len(holders := run.holders[name]) > 1]
        for name, holders in tied:
            others = [server for _, server in holders if server != run.server]
            gradient = run.parameters[name].grad
            own_stage = next(stage for stage, server in holders if server == run.server)
            key = Key(self._entry, 0, name, pb.DIRECTION_TIED, own_stage)
            run.peers.send(others, key, None if gradient is None else dense(gradient))
        for name, holders in tied:
            parts = [
                run.parameters[name].grad
                if server == run.server
                else take_tensor(run, timeline, Key(self._entry, 0, name, pb.DIRECTION_TIED, stage))
                for stage, server in holders
            ]
            timeline.switch(phases.UPDATE)
            run.parameters[name].grad = self._sum(name, [part for part in parts if part is not None])

    def norm(self) -> None:
        """Exchange sums of squares, and clip as torch.nn.utils.clip_grad_norm_ does."""
        run, timeline = self._run, self._timeline
        self._divide()
        timeline.switch(phases.UPDATE)
        own = self._own_squares()
        timeline.switch(phases.ENCODE)
        others = [server for _, _, server in run.places.norm_servers if server != run.server]
        run.peers.send(others, self._norm_key(run.replica, run.first_stage), own)
        total = torch.zeros((), dtype=torch.float64, device=run.device.torch_device)
        for replica, stage, server in run.places.norm_servers:
            total = total + (own if server == run.server else self._scalar(self._norm_key(replica, stage)))
        timeline.switch(phases.UPDATE)
        if run.places.shards > 1:
            total = TensorGroup(run, timeline, entry=self._entry, micro_batch=0, about="norm").all_reduce("", total)
        self._norm = total.sqrt()
        factor = (self._step.max_gradient_norm / (self._norm + _CLIP_EPSILON)).clamp(max=1.0)
        for gradient in self._all():
            gradient.mul_(factor)

    def update(self) -> None:
        """Divide by the total weight, run the optimizer, let the gradients go."""
        run, timeline = self._run, self._timeline
        self._divide()
        timeline.switch(phases.UPDATE)
        kept = self._copies() if self._step.return_gradients else {}
        run.agreement.before_update()
        run.optimizer.set_hyperparameters(self._step.hyperparameters.groups)
        run.optimizer.step()
        for tensor in run.agreement.updated.values():
            tensor.grad = None
        run.weight_version = self._step.step
        timeline.switch(phases.ENCODE)
        for name, gradient in kept.items():
            put_result(run, timeline, self._entry, run.result(self._entry, 0, name, gradient, stage=run.first_stage))

    def gradient_norm(self) -> float | None:
        """Return the norm before clipping; None if it was not asked for. Waits for the device."""
        return None if self._norm is None else self._run.device.numbers([self._norm])[0]

    def _all(self) -> list[torch.Tensor]:
        return [tensor.grad for tensor in self._run.agreement.updated.values() if tensor.grad is not None]

    def _sum(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor | None:
        if not parts:
            return None
        for part in parts:
            if part.shape != self._run.parameters[name].shape or part.dtype != parts[0].dtype:
                raise FrameError(
                    f"A gradient does not fit the tied tensor {name!r}",
                    expected=f"shape {list(self._run.parameters[name].shape)}, {parts[0].dtype}",
                    got=f"shape {list(part.shape)}, {part.dtype}",
                )
        # A copy: one's own gradient may still be on its way to others, and received memory is read-only.
        total = parts[0].clone()
        for part in parts[1:]:
            total.add_(part)
        return total

    def _divide(self) -> None:
        """Divide every gradient by the total weight, once."""
        if self._divided:
            return
        self._divided = True
        weight = self._total_weight()
        self._timeline.switch(phases.UPDATE)
        for gradient in self._all():
            gradient.div_(weight)

    def _total_weight(self) -> float | torch.Tensor:
        run = self._run
        if run.loss_form == graph_pb2.LOSS_FORM_MEAN_OVER_ROWS:
            return float(
                sum(part.rows for part in self._step.micro_batches if part.replica in run.places.weighed_replicas)
            )
        weights = []
        for replica in run.places.weighed_replicas:
            if (
                replica == run.replica
                and run.server == run.places.last_server
                and (own := self._passes.own_weight()) is not None
            ):
                weights.append(own)
            else:
                key = Key(self._entry, 0, "", pb.DIRECTION_WEIGHT, run.places.last_stage, source_member=replica)
                weights.append(self._scalar(key))
        return weights[0] if len(weights) == 1 else torch.stack(weights).sum()

    def _scalar(self, key: Key) -> torch.Tensor:
        tensor = take_tensor(self._run, self._timeline, key)
        if tensor is None or tensor.dim() != 0 or tensor.dtype != torch.float64:
            raise FrameError(f"Wrong content: {key}", expected="a float64 scalar", got=str(tensor))
        return tensor

    def _own_squares(self) -> torch.Tensor:
        """Return the sum of squares of the gradients that count here: each element's at one server.

        Of shards each counts its parts, and the first of them what all have.
        """
        norms = [
            torch.linalg.vector_norm(
                torch.view_as_real(gradient) if gradient.is_complex() else gradient, dtype=torch.float64
            )
            for name, tensor in self._run.agreement.updated.items()
            if (gradient := tensor.grad) is not None
            and self._run.agreement.counts(name)
            and (self._run.places.speaks or name in self._run.split_names)
        ]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self._run.device.torch_device)
        return torch.stack(norms).square().sum()

    def _norm_key(self, replica: int, stage: int) -> Key:
        return Key(self._entry, 0, "", pb.DIRECTION_NORM, stage, source_member=replica)

    def _copies(self) -> dict[str, torch.Tensor | None]:
        """Copy the gradients that the client collects here, before the optimizer may write to them."""
        run = self._run
        shared = run.agreement.whole_gradients()
        whole = WholeTensors(run, self._timeline, self._entry, "gradients")
        kept = {}
        for name, tensor in run.parameters.items():
            if run.places.leads and run.owns(name):
                own = None if tensor.grad is None else tensor.grad.clone()
                gradient = shared.get(name, own)
                kept[name] = None if gradient is None else whole.of(name, gradient)
        return kept if run.places.answers else {}
