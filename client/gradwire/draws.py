"""Random numbers in this process as the stage servers draw them, for a comparison of the user's own eager module.

Servers seed the generator before each random node of the graph. Here the operators that eager mode draws with are
counted, and seeded as the node that each belongs to: the graph was traced from the same code, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradwire.graph.randomness import Draw, can_stand_for, draws
from gradwire_protocol.errors import ModelError
from gradwire_protocol.randomness import draw_seed, node_number

# Between two draws the generator is seeded with this + how many were made. A checkpoint (torch.utils.checkpoint) keeps
# the generator's state and puts it back to compute its region again: so it puts back the count, too.
_MARK = 0x67726164 << 32
_REMEDY = (
    "draw with torch's operators, once for each micro-batch and always in the same order; or set dropout to 0 for the "
    "comparison"
)


class SeededDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, random operators draw what the stage servers draw for one micro-batch.

    Active around the backward pass too, which computes checkpoints again. Changes the state of the generator.
    """

    def __init__(
        self, expected: Sequence[Draw], device: torch.device, *, seed: int, step: int, micro_batch: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._generator = _generator(device)
        self._key = (seed, step, micro_batch)
        # Each call of an operator, and whether it is the first of its node.
        self._calls = [(draw, call == 0) for draw in expected for call in range(draw.calls)]
        self._within: dict[int, torch.Tensor] = {}  # states of the generator between two calls of one node
        self._mark(0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if not draws(function, args, keywords):
            return function(*args, **keywords)
        position = self._position()
        draw, is_first = self._call(position, function)
        if is_first:
            self._generator.manual_seed(draw_seed(*self._key, node_number(draw.node)))
        else:
            self._generator.set_state(self._within[position])
        result = function(*args, **keywords)
        self._check_device(result, draw)
        position += 1
        if position < len(self._calls) and not self._calls[position][1]:
            self._within[position] = self._generator.get_state()
        self._mark(position)
        return result

    def check_complete(self) -> None:
        """ModelError unless as much was drawn as the cluster draws."""
        position = self._position()
        if position < len(self._calls):
            raise self._differs(position, "nothing more")

    def _mark(self, position: int) -> None:
        self._generator.manual_seed(_MARK + position)

    def _position(self) -> int:
        """How many calls were made, as the generator's state says it."""
        position = self._generator.initial_seed() - _MARK
        if not 0 <= position <= len(self._calls) or not torch.equal(self._fresh(position), self._generator.get_state()):
            raise ModelError(
                "The model seeds the generator, or draws random numbers in a way that the comparison does not see",
                expected="random operators of torch, which the stage servers seed one by one",
                got="a generator in another state than the last of them left it in",
                remedy=f"{_REMEDY}; custom operators that draw need tags=(torch.Tag.nondeterministic_seeded,)",
            )
        return position

    def _fresh(self, position: int) -> torch.Tensor:
        return torch.Generator(self._device).manual_seed(_MARK + position).get_state()

    def _call(self, position: int, function: Any) -> tuple[Draw, bool]:
        if position == len(self._calls) or not can_stand_for(function, self._calls[position][0].target):
            raise self._differs(position, str(function))
        return self._calls[position]

    def _check_device(self, result: Any, draw: Draw) -> None:
        others = {leaf.device for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)} - {self._device}
        if any(device.type != self._device.type for device in others):
            raise ModelError(
                f"The model draws random numbers on another device than its parameters', at {draw.place}",
                expected=str(self._device),
                got=", ".join(map(str, others)),
                remedy="draw on the device of the parameters, as the stage servers do",
            )

    def _differs(self, position: int, got: str) -> ModelError:
        count = len(self._calls)
        expected = f"no more than {count} draw(s) in a micro-batch"
        if position < count:
            draw = self._calls[position][0]
            expected = f"draw {position + 1} of {count} of a micro-batch: {draw.target}, at {draw.place}"
        return ModelError(
            "The model draws other random numbers in eager mode than its exported graph does",
            expected=expected,
            got=got,
            remedy=_REMEDY,
        )


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
