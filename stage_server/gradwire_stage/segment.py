"""Runs one segment of a graph: forward for a micro-batch, and later its backward.

Leaves to the executor where values come from and go to, and to the optimizer what becomes of gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch

from gradwire_protocol.errors import GradwireError, InternalError, ModelError
from gradwire_protocol.v1 import stage_pb2 as pb
from gradwire_stage.buffers import BufferVersions
from gradwire_stage.failures import located
from gradwire_stage.group.tensor_group import Shards
from gradwire_stage.randomness import Randomness
from gradwire_stage.rebuild import Rebuilt, value_names
from gradwire_stage.recomputation import Inputs, drop_saved_tensors
from gradwire_stage.regions import Scope
from gradwire_stage.split_backward import WeightGradients, run_input_part

Value = torch.Tensor | int | float | bool


class _Parts(NamedTuple):
    """Names of the values that leave a segment, by what they are for."""

    outgoing: tuple[str, ...]
    results: tuple[str, ...]
    loss: str
    loss_weight: str

    @classmethod
    def of(cls, segment: pb.Segment) -> _Parts:
        outgoing, results = (tuple(item.value for item in items) for items in (segment.outgoing, segment.results))
        return cls(outgoing, results, segment.loss, segment.loss_weight)


class BuiltSegment:
    """A segment, rebuilt for a device. Use from one thread only: random operators share the process's generator."""

    def __init__(
        self,
        segment: pb.Segment,
        tensors: MutableMapping[str, torch.Tensor],
        device: torch.device,
        seed: int,
        precision: torch.dtype | None = None,
        custom: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
        shards: int = 1,
    ) -> None:
        """`tensors` is the server's store, by tensor name; a pass replaces the buffers that it changes in it.

        precision: run forwards under autocast to this type. custom: operators that are admitted besides the
        allow-list, by target. shards: servers that run it together. ModelError for anything that is not allowed or does
        not fit together.
        """
        self._parts = _Parts.of(segment)
        self._tensors = tensors
        self._device = device
        uses = value_names(segment.tensors)
        missing = [name for name in uses if name not in tensors]
        if missing:
            raise ModelError(
                "A segment uses tensors that this server does not hold",
                expected=", ".join(uses)[:500],
                got=f"without {', '.join(missing)[:500]}",
            )
        self._names = tuple(uses)
        self._incoming = tuple(item.value for item in segment.incoming)
        self._cloned = frozenset(segment.mutated_inputs).intersection(self._incoming)
        # A value with a later consumer gets that consumer's gradient through a relay made behind this segment's own
        # uses, so that the sum has the order that it has in one process.
        self._relayed = tuple(item.value for item in segment.incoming if item.HasField("gradient_from_stage"))
        self._updates = {item.value: item.tensor for item in segment.buffer_updates}
        wanted = [item.value for item in segment.outgoing] + [item.value for item in segment.results]
        wanted += [value for value in (segment.loss, segment.loss_weight) if value] + list(self._updates)
        self._outputs = tuple(dict.fromkeys(wanted))
        self._rebuilt = Rebuilt(segment.nodes, uses, self._incoming, self._outputs, device, custom, shards)
        self._buffers = BufferVersions(tensors, (name for name in segment.mutated_tensors if name in uses))
        self._randomness = Randomness(seed, device)
        self._precision = precision
        self._writes = any(node.mutated_arguments or node.mutated_keyword_arguments for node in segment.nodes)

    def forward(
        self,
        values: Mapping[str, Value],
        *,
        step: int,
        micro_batch: int,
        record: bool,
        keep: bool = True,
        group: Shards | None = None,
    ) -> SegmentPass:
        """Run the nodes on a micro-batch.

        `values` holds the incoming values; a tensor among them that requires grad gets its gradient back from
        `SegmentPass.backward`. Without `record` nothing is kept for a backward pass. With it, but without `keep`,
        only the inputs are kept: `again` makes the pass that has a backward. group: the servers that run it together,
        for this pass.
        """
        missing = [value for value in self._incoming if value not in values]
        if missing:
            raise InternalError(f"A segment was run without its incoming values {', '.join(missing)}")
        inputs = Inputs(dict(values), tuple(self._tensors[name] for name in self._names), step, micro_batch)
        with contextlib.nullcontext() if keep else drop_saved_tensors():
            made, changed = self._run(inputs, record, group)
        self._buffers.commit(changed)
        return made if keep else made.without_backward(inputs)

    def again(self, inputs: Inputs, group: Shards | None = None) -> SegmentPass:
        """Run a pass again, exactly as it ran, for its backward. Buffers change only once for a pass: not here."""
        made, _ = self._run(inputs, True, group)
        return made

    def _run(self, inputs: Inputs, record: bool, group: Shards | None) -> tuple[SegmentPass, dict[str, torch.Tensor]]:
        """Run the nodes; return the pass, and the new versions of the buffers that it changed."""
        gradients: dict[str, torch.Tensor] = {}
        entering: dict[str, Value] = {}
        own: Sequence[torch.Tensor] = inputs.tensors
        written = self._buffers.copies(self._names, own)
        if written:
            own = [written.get(name, tensor) for name, tensor in zip(self._names, own, strict=True)]
        relays: dict[str, torch.Tensor] = {}
        with (
            torch.set_grad_enabled(record),
            Scope(
                *(self._rebuilt.regions, self._device, self._randomness, inputs.step, inputs.micro_batch),
                precision=self._precision,
                group=group,
                writes=self._writes,
            ) as scope,
        ):
            for name in self._incoming:
                entering[name] = self._enter(name, inputs.values[name], record, gradients)
            try:
                made = self._rebuilt.call(scope, *own, *entering.values())
            except GradwireError:
                raise  # of what servers do together, or of the run
            except Exception as error:
                raise located(error, self._rebuilt.nodes, "A segment") from error
            for name in self._relayed:
                value = entering[name]
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    relays[name] = torch.ops.aten.alias.default(value)
        outputs = dict(zip(self._outputs, made, strict=True))
        # What was assigned counts after what was written in place.
        written |= {tensor: outputs[name] for name, tensor in self._updates.items()}
        return SegmentPass(self._parts, entering, outputs, relays, gradients), written

    def _enter(self, name: str, value: Value, record: bool, gradients: dict[str, torch.Tensor]) -> Value:
        """Hand a value to the code: cloned if written to; never as a leaf, whose gradient would take its layout.

        An alias also keeps autocast from caching its cast, and in-place operators from a leaf.
        """
        if not isinstance(value, torch.Tensor):
            return value
        if name in self._cloned:
            return value.detach().clone()
        if not (record and value.requires_grad):
            return value.detach()
        leaf = value.detach().requires_grad_()
        # The same as an alias, which as an operator of torch.ops is called by a longer way.
        alias = leaf.view_as(leaf)
        alias.register_hook(partial(gradients.__setitem__, name))  # type: ignore[no-untyped-call]
        return alias


class SegmentPass:
    """One micro-batch's way through a segment: its results, and its backward pass, once."""

    def __init__(
        self,
        parts: _Parts,
        entering: Mapping[str, Value],
        outputs: Mapping[str, Value],
        relays: dict[str, torch.Tensor],
        gradients: dict[str, torch.Tensor],
    ) -> None:
        self.outgoing: dict[str, Value] = {name: outputs[name] for name in parts.outgoing}
        self.loss = _tensor(outputs[parts.loss]) if parts.loss else None
        self.loss_weight: Value | None = outputs[parts.loss_weight] if parts.loss_weight else None
        self.results: dict[str, Value] = {name: _detached(outputs[name]) for name in parts.results}
        self._wanting = [name for name, value in entering.items() if _requires_grad(value)]
        self._relays = relays
        self._gradients = gradients
        # Of a pass without backward: what to run it again from.
        self.inputs: Inputs | None = None
        self._weights: WeightGradients | None = None

    def without_backward(self, inputs: Inputs) -> Self:
        """Let go of what autograd recorded; outgoing values still say whether they need a gradient."""
        self.inputs = inputs
        self.outgoing = {name: _severed(value) for name, value in self.outgoing.items()}
        self.loss = None if self.loss is None else self.loss.detach()
        self._relays = {}
        return self

    def backward(
        self,
        gradients: Mapping[str, torch.Tensor | None],
        relayed: Mapping[str, torch.Tensor | None],
        loss_gradient: float | None,
    ) -> dict[str, torch.Tensor | None]:
        """Accumulate parameters' gradients and return those of the incoming values that asked for one.

        `gradients` belongs to outgoing values, `relayed` to incoming ones: the gradient of the consumer after this
        one. None means that the loss does not depend on a value. Frees the pass.
        """
        outputs, output_gradients = self._roots(gradients, relayed, loss_gradient)
        self._free()
        if outputs:
            with _located():
                torch.autograd.backward(outputs, output_gradients)
        return self._made()

    def backward_input(
        self,
        gradients: Mapping[str, torch.Tensor | None],
        relayed: Mapping[str, torch.Tensor | None],
        loss_gradient: float | None,
    ) -> dict[str, torch.Tensor | None]:
        """Do what `backward` does, but for the gradients of weights that `backward_weight` can make later.

        Frees all of the pass that those do not need.
        """
        outputs, output_gradients = self._roots(gradients, relayed, loss_gradient)
        self._free()
        self._weights = WeightGradients()
        if outputs:
            with _located():
                self._weights = run_input_part(outputs, output_gradients)
        return self._made()

    @property
    def weights_left(self) -> list[torch.nn.Parameter]:
        """The parameters whose gradients `backward_input` has left to `backward_weight`, some or all of it."""
        return [] if self._weights is None else self._weights.parameters

    def backward_weight(self, added: Callable[[torch.nn.Parameter], None] = lambda parameter: None) -> None:
        """Accumulate the parameters' gradients that `backward_input` has left, and say so of each. Frees the pass."""
        weights, self._weights = self._weights, None
        if weights is None:
            raise InternalError("The weight gradients of a segment were asked for before its input gradients, or twice")
        with _located():
            weights.accumulate(added)

    def _roots(
        self,
        gradients: Mapping[str, torch.Tensor | None],
        relayed: Mapping[str, torch.Tensor | None],
        loss_gradient: float | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return where a backward begins, and the gradients there."""
        if self.inputs is not None:
            raise InternalError("The backward pass of a segment began before its forward pass was run again")
        roots: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, value in self.outgoing.items():
            gradient = gradients.get(name)
            if gradient is not None and isinstance(value, torch.Tensor) and value.requires_grad:
                roots.append((value, gradient))
        for name, relay in self._relays.items():
            gradient = relayed.get(name)
            if gradient is not None:
                roots.append((relay, gradient))
        if self.loss is not None and loss_gradient is not None and self.loss.requires_grad:
            roots.append((self.loss, torch.full_like(self.loss, loss_gradient)))
        return [output for output, _ in roots], [gradient for _, gradient in roots]

    def _free(self) -> None:
        self.outgoing, self.results, self._relays = {}, {}, {}
        self.loss = self.loss_weight = None

    def _made(self) -> dict[str, torch.Tensor | None]:
        return {name: self._gradients.pop(name, None) for name in self._wanting}


@contextlib.contextmanager
def _located() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise located(error, {}, "The backward pass of a segment") from error


def _tensor(value: Value) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ModelError("The loss of a segment is not a tensor", expected="a 0-d tensor", got=type(value).__name__)
    return value


def _requires_grad(value: Value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _severed(value: Value) -> Value:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _detached(value: Value) -> Value:
    return value.detach() if isinstance(value, torch.Tensor) else value
