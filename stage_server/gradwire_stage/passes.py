"""Forward and backward of the micro-batches of one entry: waits for what a segment needs, sends what it makes.

In which order is the program's business; what becomes of the parameters' gradients is gradients.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gradwire_protocol.errors import FrameError, PlanError
from gradwire_protocol.v1 import graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb
from gradwire_stage import timeline as phases
from gradwire_stage.group.spread import gathered, sent_part
from gradwire_stage.group.tensor_group import TensorGroup
from gradwire_stage.headers import Value
from gradwire_stage.keys import Key
from gradwire_stage.outbox import Result
from gradwire_stage.peers import Incoming
from gradwire_stage.recomputation import Inputs
from gradwire_stage.routes import Input, Output
from gradwire_stage.run_state import RunState
from gradwire_stage.segment import SegmentPass
from gradwire_stage.taking import take, take_tensor
from gradwire_stage.timeline import Timeline


def put_result(run: RunState, timeline: Timeline[Any], entry: int, result: Result) -> None:
    """Leave a result for the client; waits for it while the outbox is full."""
    if not run.outbox.has_room(result):
        previous = timeline.switch(phases.WAIT_EXCHANGE)
        run.outbox.put(entry, result)
        timeline.switch(previous)
    else:
        run.outbox.put(entry, result)


@dataclass(slots=True)
class _Open:
    """A micro-batch between its forward and its backward."""

    # Itself, or what to run it again from.
    segment_pass: SegmentPass | Inputs
    # Incoming values whose gradient their sender wants.
    wanted: list[Input]
    # Outgoing values whose gradient is wanted here.
    expected: list[Output]


class Passes:
    """The forward and backward actions of one entry. For the compute thread."""

    def __init__(
        self,
        run: RunState,
        timeline: Timeline[Any],
        *,
        entry: int,
        graph: graph_pb2.GraphKind,
        rows: Mapping[int, int],
        step: int,
    ) -> None:
        self._run = run
        self._timeline = timeline
        self._entry = entry
        self._graph = graph
        self._rows = rows  # of each micro-batch
        self._step = step
        self._record = graph == graph_pb2.GRAPH_KIND_TRAIN
        self._open: dict[tuple[int, int], _Open] = {}
        # Between the two parts of a split backward.
        self._split: dict[tuple[int, int], SegmentPass] = {}
        # Messages that several segments here read, and how many are still to do so.
        self._shared: dict[Key, tuple[Incoming, int]] = {}
        # Of the last stage: (micro-batch, loss, weight).
        self._losses: list[tuple[int, torch.Tensor, Value]] = []

    def forward(self, stage: int, micro_batch: int, *, keep: bool = True) -> None:
        """Run a stage's segment on a micro-batch. Without `keep` its backward will run it again."""
        segment = self._run.segments.get((self._graph, stage))
        if segment is None:
            raise PlanError(f"Stage {stage} has no segment of the graph", got=graph_pb2.GraphKind.Name(self._graph))
        timeline = self._timeline
        self._run.mailbox.begin(self._entry, micro_batch, training=self._record)
        routes = self._run.routes[self._graph, stage]
        values: dict[str, Value] = {}
        wanted: list[Input] = []
        for source in routes.inputs:
            value = self._receive(source, stage, micro_batch)
            values[source.value] = value
            if isinstance(value, torch.Tensor) and value.requires_grad:
                wanted.append(source)
        timeline.switch(phases.FORWARD)
        buffers = self._run.agreement.buffers if self._record else None
        before = {} if buffers is None else buffers.versions()
        made = segment.forward(
            values,
            step=self._step,
            micro_batch=micro_batch,
            record=self._record,
            keep=keep,
            group=self._group(f"{stage}F", micro_batch),
        )
        if buffers is not None:
            buffers.changed(micro_batch, before)
        timeline.switch(phases.ENCODE)
        expected: list[Output] = []
        for output in routes.outputs:
            value = made.outgoing[output.value]
            if isinstance(value, torch.Tensor) and value.requires_grad:
                expected.append(output)
            key = Key(self._entry, micro_batch, output.value, pb.DIRECTION_FORWARD, stage)
            self._run.peers.send(output.servers, key, self._sent(value, output.spread), output.codecs)
        for name, value in made.results.items() if self._run.places.speaks else ():
            put_result(
                self._run, timeline, self._entry, self._run.result(self._entry, micro_batch, name, value, stage=stage)
            )
        if made.loss is not None:
            self._losses.append((micro_batch, made.loss.detach(), self._weight(micro_batch, made)))
        if self._record:
            self._open[stage, micro_batch] = _Open(made if made.inputs is None else made.inputs, wanted, expected)

    def backward(self, stage: int, micro_batch: int, *, split: bool = False) -> None:
        """Run the backward of a stage's segment: gradients of its parameters add up, those of its inputs go out.

        With `split` the gradients of its weights are left to `weight_gradients`, as far as they can be.
        A forward that was not kept is run again first, and its time counts as forward: it needs no gradient, which may
        still be on its way.
        """
        run, timeline = self._run, self._timeline
        state = self._open.pop((stage, micro_batch))
        segment_pass = state.segment_pass
        if isinstance(segment_pass, Inputs):
            timeline.switch(phases.FORWARD)
            group = self._group(f"{stage}F-again", micro_batch)
            segment_pass = run.segments[self._graph, stage].again(segment_pass, group)
        gradients = {
            output.value: self._take_gradient(output, output.gradient_from, stage, micro_batch)
            for output in state.expected
        }
        relayed = {
            source.value: self._take_gradient(source, source.gradient_from, stage, micro_batch)
            for source in state.wanted
            if source.gradient_from is not None
        }
        timeline.switch(phases.BACKWARD)
        loss_gradient = self._loss_gradient(stage, micro_batch)
        if split:
            made = segment_pass.backward_input(gradients, relayed, loss_gradient)
            self._split[stage, micro_batch] = segment_pass
        else:
            made = segment_pass.backward(gradients, relayed, loss_gradient)
        timeline.switch(phases.ENCODE)
        for source in state.wanted:
            key = Key(self._entry, micro_batch, source.value, pb.DIRECTION_BACKWARD, stage)
            gradient = self._sent(made[source.value], source.spread)
            run.peers.send(source.gradient_to, key, gradient, source.gradient_codecs)

    def weight_gradients(self, stage: int, micro_batch: int) -> None:
        """Add up the gradients that a split backward has left."""
        self._timeline.switch(phases.WEIGHT)
        segment_pass = self._split.pop((stage, micro_batch))
        agreement = self._run.agreement
        agreement.left_to_add(segment_pass.weights_left)
        segment_pass.backward_weight(agreement.added)

    def own_weight(self) -> torch.Tensor | None:
        """Return the total weight of the losses made here, 0-d float64 on the device; None before the last of them.

        0 where this replica has no micro-batch.
        """
        if len(self._losses) < len(self._rows):
            return None
        weights = [
            weight.detach().to(torch.float64)
            if isinstance(weight, torch.Tensor)
            else torch.full((), weight, dtype=torch.float64, device=self._run.device.torch_device)
            for _, _, weight in self._losses_in_order()
        ]
        if not weights:
            return torch.zeros((), dtype=torch.float64, device=self._run.device.torch_device)
        return torch.stack(weights).sum()

    def loss_parts(self) -> list[run_pb2.LossPart]:
        """Return the losses made here, in micro-batch order. Waits for the device."""
        losses = self._losses_in_order()
        tensors = [loss for _, loss, _ in losses]
        tensors += [weight for _, _, weight in losses if isinstance(weight, torch.Tensor)]
        numbers = self._run.device.numbers(tensors)
        sums, weights = numbers[: len(losses)], iter(numbers[len(losses) :])
        over_rows = self._run.loss_form == graph_pb2.LOSS_FORM_MEAN_OVER_ROWS
        parts = []
        for (micro_batch, _, weight), total in zip(losses, sums, strict=True):
            number = next(weights) if isinstance(weight, torch.Tensor) else float(weight)
            parts.append(
                run_pb2.LossPart(micro_batch=micro_batch, sum=total * number if over_rows else total, weight=number)
            )
        return parts

    def _losses_in_order(self) -> list[tuple[int, torch.Tensor, Value]]:
        return sorted(self._losses, key=lambda part: part[0])

    def _weight(self, micro_batch: int, made: SegmentPass) -> Value:
        if self._run.loss_form == graph_pb2.LOSS_FORM_MEAN_OVER_ROWS:
            return self._rows[micro_batch]
        weight = made.loss_weight
        if weight is None:
            raise PlanError("The segment of the last stage gives no weight of its loss", expected="Segment.loss_weight")
        return weight.detach() if isinstance(weight, torch.Tensor) else weight

    def _loss_gradient(self, stage: int, micro_batch: int) -> float | None:
        if self._run.loss_stage.get(self._graph) != stage:
            return None
        if self._run.loss_form == graph_pb2.LOSS_FORM_MEAN_OVER_ROWS:
            return float(self._rows[micro_batch])
        return 1.0

    def _group(self, about: str, micro_batch: int) -> TensorGroup | None:
        """Return the other shards, for what is done with a micro-batch here; None where there are none."""
        if self._run.places.shards == 1:
            return None
        return TensorGroup(self._run, self._timeline, entry=self._entry, micro_batch=micro_batch, about=about)

    def _sent(self, value: Value | None, spread: int | None) -> Value | None:
        """Return what of a value, or a gradient, is this server's to send."""
        if spread is None or not isinstance(value, torch.Tensor):
            return value
        places = self._run.places
        return sent_part(value, spread, shards=places.shards, shard=places.shard)

    def _whole(self, what: str, name: str, tensor: torch.Tensor, spread: int | None, micro_batch: int) -> torch.Tensor:
        """Return all of what came, bringing together what came in parts."""
        group = None if spread is None else self._group(what, micro_batch)
        return tensor if spread is None or group is None else gathered(group, name, tensor, spread)

    def _take_gradient(
        self, value: Input | Output, source_stage: int, stage: int, micro_batch: int
    ) -> torch.Tensor | None:
        key = Key(self._entry, micro_batch, value.value, pb.DIRECTION_BACKWARD, source_stage)
        tensor = take_tensor(self._run, self._timeline, key)
        if tensor is None:
            return None
        return self._whole(f"{stage}B-gradient", value.value, tensor, value.spread, micro_batch)

    def _receive(self, source: Input, stage: int, micro_batch: int) -> Value:
        """Take an incoming value; a tensor whose gradient is wanted comes as a leaf that requires one."""
        direction = pb.DIRECTION_BATCH if source.from_batch else pb.DIRECTION_FORWARD
        key = Key(self._entry, micro_batch, source.value, direction, source.source_stage)
        content = self._take_shared(key, source.readers) if source.readers > 1 else take(self._run, self._timeline, key)
        if isinstance(content, pb.Absent):
            raise FrameError(f"A message carries nothing: {key}", expected="a tensor or a number", got="absent")
        if not isinstance(content, tuple):
            return content
        arrived, wanted = content
        tensor = self._run.device.claim(arrived)
        tensor = self._whole(f"{stage}F-value", source.value, tensor, source.spread, micro_batch)
        # Detached: other segments here may read the same tensor, and each has its own gradient.
        return tensor.detach().requires_grad_() if wanted and self._record else tensor

    def _take_shared(self, key: Key, readers: int) -> Incoming:
        content, left = self._shared.pop(key, (None, readers))
        if content is None:
            content = take(self._run, self._timeline, key)
        if left > 1:
            self._shared[key] = (content, left - 1)
        return content
