"""Operators of a user's own, as a test's script and its stage servers import them."""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("gradwire_test::swish", mutates_args=())
def swish(x: torch.Tensor, slope: float) -> torch.Tensor:
    """x × sigmoid(slope × x)."""
    return x * torch.sigmoid(slope * x)


@swish.register_fake
def _(x: torch.Tensor, slope: float) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gradwire_test::swish_backward", mutates_args=())
def swish_backward(gradient: torch.Tensor, x: torch.Tensor, slope: float) -> torch.Tensor:
    """The gradient of `swish`, which autograd alone would not know."""
    gate = torch.sigmoid(slope * x)
    return gradient * (gate + slope * x * gate * (1 - gate))


def _keep_input(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.slope = inputs[1]


def _swish_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    (x,) = ctx.saved_tensors
    return swish_backward(gradient, x, ctx.slope), None


swish.register_autograd(_swish_gradient, setup_context=_keep_input)


@torch.library.custom_op("gradwire_test::split_sum", mutates_args=())
def split_sum(parts: list[torch.Tensor], scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of tensors, scaled, and the largest of each row of the sum."""
    total = torch.stack(parts).sum(0)
    if scale is not None:
        total = total * scale
    return total, total.amax(-1)


@split_sum.register_fake
def _(parts: list[torch.Tensor], scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(parts[0]), parts[0].new_empty(parts[0].shape[:-1])


def _keep_sum(
    ctx: Any, inputs: tuple[list[torch.Tensor], torch.Tensor | None], output: tuple[torch.Tensor, ...]
) -> None:
    ctx.save_for_backward(*inputs[0], inputs[1], output[0].argmax(-1, keepdim=True))


def _split_sum_gradient(
    ctx: Any, total: torch.Tensor, largest: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    *parts, scale, index = ctx.saved_tensors
    summed = total.scatter_add(-1, index, largest[..., None])
    return [summed * scale for _ in parts], (summed * torch.stack(parts).sum(0)).sum()


split_sum.register_autograd(_split_sum_gradient, setup_context=_keep_sum)


@torch.library.custom_op("gradwire_test::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noise(x: torch.Tensor) -> torch.Tensor:
    """Random numbers of the same shape."""
    return torch.rand_like(x)


@noise.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gradwire_test::halve_in_place", mutates_args=("x",))
def halve_in_place(x: torch.Tensor) -> None:
    """Writes to its argument: no stage server admits it."""
    x.mul_(0.5)
