"""The cross-entropy of scores of which each tensor-parallel server has a part of the classes, as torch defines it.

Servers tell each other two numbers for each row, in two exchanges, and no scores (Megatron-LM, Shoeybi et al., 2019):
the largest score; then the sum of exponentials, the score of the target, and with label smoothing the sum of scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from gradwire_protocol.errors import ModelError
from gradwire_stage.group.tensor_group import Shards
from gradwire_stage.regions import Scope, autocast_type

_NONE, _MEAN, _SUM = range(3)


def cross_entropy(
    scope: Scope,
    name: str,
    scores: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the loss, which is whole and has the same bits everywhere.

    scores: (rows, own classes, ...), or (own classes,). target: indices of classes, without the classes' dimension.
    weight: of all classes.
    """
    if target.is_floating_point() or target.dim() != max(0, scores.dim() - 1) or reduction not in (_NONE, _MEAN, _SUM):
        raise ModelError(
            "This cross-entropy cannot be shared by servers",
            expected="targets that are indices of classes, and a reduction from 0 to 2",
            got=f"scores {list(scores.shape)}, targets {list(target.shape)} of {target.dtype}, reduction {reduction}",
        )
    # As torch: under autocast the result is in this type, too.
    if autocast_type(scores.device) is not None and scores.dtype != torch.float64:
        scores = scores.float()
    rows, targets = (scores.unsqueeze(0), target.unsqueeze(0)) if scores.dim() == 1 else (scores, target)
    losses, shares = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        scope.group, name, rows, targets, weight, ignore_index, label_smoothing
    )
    if reduction == _NONE:
        made: torch.Tensor = losses[0] if scores.dim() == 1 else losses
    else:
        made = losses.sum() if reduction == _SUM else losses.sum() / shares.sum()
    return made.to(scores.dtype)


class _CrossEntropy(Function):
    """Gives the losses of rows, and what each counts in their mean."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Shards,
        name: str,
        scores: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        ignore_index: int,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = scores.shape[1]
        first, classes = group.own * own, own * group.size
        work = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        largest = torch.stack(group.all_gather(f"{name}/largest", work.amax(1))).amax(0)
        shifted = work - largest.unsqueeze(1)
        counts = target != ignore_index
        torch._assert_async(
            (~counts | ((target >= 0) & (target < classes))).all(), "a target is not one of the classes"
        )
        local = target - first
        inside = counts & (local >= 0) & (local < own)
        place = local.masked_fill(~inside, 0).unsqueeze(1)
        exponentials = shifted.exp()
        sums = [exponentials.sum(1), shifted.gather(1, place).squeeze(1).masked_fill(~inside, 0)]
        # (1, classes, 1, ...), to go with scores
        weights = None if weight is None else weight.to(work.dtype).view(1, -1, *[1] * (scores.dim() - 2))
        own_weights = None if weights is None else weights.narrow(1, first, own)
        if smoothing:
            sums.append((shifted if own_weights is None else shifted * own_weights).sum(1))
        total, at_target, *smoothed = group.all_reduce(f"{name}/sums", torch.stack(sums)).unbind()
        log_total = total.log()
        # What the target's term counts, which is also the row's share of the mean.
        shares = counts.to(work.dtype)
        if weight is not None:
            shares = shares * weight.to(work.dtype)[target.masked_fill(~counts, 0)]
        losses = (1 - smoothing) * shares * (log_total - at_target)
        all_weights = classes if weight is None else weight.to(work.dtype).sum()
        if smoothing:
            losses = losses + smoothing / classes * (log_total * all_weights - smoothed[0])
        losses = losses.masked_fill(~counts, 0)
        ctx.save_for_backward(exponentials / total.unsqueeze(1), place, inside, counts, shares, own_weights)
        ctx.smoothing, ctx.classes, ctx.all_weights, ctx.dtype = smoothing, classes, all_weights, scores.dtype
        ctx.mark_non_differentiable(shares)
        return losses, shares

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities, place, inside, counts, shares, own_weights = ctx.saved_tensors
        smoothing, classes = ctx.smoothing, ctx.classes
        of_target = (1 - smoothing) * shares
        of_all = of_target + smoothing / classes * ctx.all_weights
        made = probabilities * of_all.unsqueeze(1)
        made.scatter_add_(1, place, (of_target.neg() * inside).unsqueeze(1))
        if smoothing:
            made -= smoothing / classes * (1.0 if own_weights is None else own_weights)
        made *= (gradient * counts).unsqueeze(1)
        return None, None, made.to(ctx.dtype), None, None, None, None
