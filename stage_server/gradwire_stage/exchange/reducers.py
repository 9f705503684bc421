"""How the members of a group come to agree on the gradients of a bucket: one reducer for every codec.

A reducer holds what its codec keeps of one bucket from step to step. The codecs have a file each; what none of them
changes goes round as it is (`collectives.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from gradwire_protocol.gradient_codecs import GRADIENT_CODEC_NAMES, GradientCodec, parse_compression
from gradwire_stage.exchange import collectives
from gradwire_stage.exchange.buckets import Bucket
from gradwire_stage.exchange.collectives import Group, Steps
from gradwire_stage.exchange.encoded_ring import EncodedRing
from gradwire_stage.exchange.feedback import work_type
from gradwire_stage.exchange.half import BF16, FP16
from gradwire_stage.exchange.int8 import INT8
from gradwire_stage.exchange.powersgd import PowerSgd
from gradwire_stage.exchange.topk import TopK
from gradwire_stage.optimizer import StateValue

if TYPE_CHECKING:
    from gradwire_stage.run_state import RunState


class Reducer(Protocol):
    """Sums one bucket over the members of a group, in every step. All members make the same calls."""

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        """Return the sum as far as the codec keeps it, a tensor of the same bits everywhere; alone, the gradient.

        gradient: flat, not written to. step: its number in training, from 0.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """Return what is kept for later steps, over its own memory.

        Flat, of the whole bucket (it may be longer), or of one of its tensors: "<name>.<place>".
        """

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave, before the first step. Keeps no part of it that does not fit."""


class Exact:
    """The sum itself, but for rounding. Keeps nothing."""

    def __init__(self, add_up: Callable[[torch.Tensor], Steps[torch.Tensor]] | None = None) -> None:
        """add_up: over the same members, in place of messages."""
        self._add_up = add_up

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        add_up = self._add_up
        total = yield from collectives.all_reduce(group, gradient) if add_up is None else add_up(gradient)
        return total

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing is kept."""


_REDUCERS: dict[str, Callable[[GradientCodec, Sequence[torch.Size]], Reducer]] = {
    "none": lambda codec, shapes: Exact(),
    "fp16": lambda codec, shapes: EncodedRing(FP16),
    "bf16": lambda codec, shapes: EncodedRing(BF16),
    "int8": lambda codec, shapes: EncodedRing(INT8),
    "topk": lambda codec, shapes: TopK(codec),
    "powersgd": PowerSgd,
}

if set(_REDUCERS) != set(GRADIENT_CODEC_NAMES):
    raise RuntimeError("every codec of gradwire_protocol.gradient_codecs needs a reducer in gradwire_stage.exchange")


def make_reducer(codec: GradientCodec, shapes: Sequence[torch.Size]) -> Reducer:
    """Return the reducer of a bucket of parameters of these shapes, of one floating type. "none" takes any type."""
    return _REDUCERS[codec.name](codec, shapes)


def make_reducers(run: RunState, codec: GradientCodec, buckets: Iterable[Bucket]) -> list[Reducer]:
    """Return the reducers of a run's buckets: what replicas exchange as it is goes by the run's transport."""
    exact = parse_compression("none")
    transport = run.replica_transport
    return [
        make_reducer(codec if bucket.data_type.is_floating_point else exact, bucket.shapes)
        if transport is None
        else Exact(transport.all_reduce)
        for bucket in buckets
    ]


def tensors_of(state: Mapping[str, StateValue], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return those values of a state that are tensors and have names with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and isinstance(value, torch.Tensor)
    }


def state_of_tensor(reducer: Reducer, place: int, shapes: Sequence[torch.Size]) -> dict[str, torch.Tensor]:
    """Return what a reducer keeps of one tensor of its bucket, over its own memory."""
    found = {}
    for name, tensor in reducer.state().items():
        name, _, of_place = name.partition(".")
        if not of_place:
            sizes = [shape.numel() for shape in shapes]
            found[name] = torch.split(tensor[: sum(sizes)], sizes)[place].view(shapes[place])
        elif int(of_place) == place:
            found[name] = tensor
    return found


def restore_tensors(
    reducer: Reducer, states: Sequence[Mapping[str, torch.Tensor]], shapes: Sequence[torch.Size], like: torch.Tensor
) -> None:
    """Have a reducer keep again what `state_of_tensor` gave of its tensors; zeros for those without.

    like: tells the device, and the type for zeros.
    """
    whole: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        parts = [
            state[name].reshape(-1)
            if name in state and state[name].shape == shape
            else like.new_zeros(shape.numel(), dtype=work_type(like.dtype))
            for state, shape in zip(states, shapes, strict=True)
        ]
        whole[name] = torch.cat(parts).to(like.device, work_type(like.dtype))
        for place, state in enumerate(states):
            if name in state:
                whole[f"{name}.{place}"] = state[name].to(like.device, work_type(like.dtype))
    reducer.restore(whole)
