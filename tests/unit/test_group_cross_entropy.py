"""The cross-entropy of scores whose classes are shared by servers is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shard_threads import ThreadShards, run_shards, scope_of

from gradwire_protocol.errors import ModelError
from gradwire_stage.group.cross_entropy import cross_entropy
from gradwire_stage.group.parts import own_part

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
CLASSES = 12


def shared(
    size: int, scores: torch.Tensor, target: torch.Tensor, *arguments: Any
) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Return the loss at each shard, the whole gradient, and the number of exchanges."""
    dim = 0 if scores.dim() == 1 else 1

    def work(group: ThreadShards) -> tuple[torch.Tensor, torch.Tensor]:
        own = own_part(scores.detach(), dim, [CLASSES], shards=group.size, shard=group.own).clone().requires_grad_()
        loss = cross_entropy(scope_of(group), "loss", own, target, *arguments)
        # Of each row another one, where there are several.
        (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
        assert own.grad is not None
        assert own.grad.dtype == own.dtype
        return loss.detach(), own.grad

    found, table = run_shards(size, work)
    return [loss for loss, _ in found], torch.cat([gradient for _, gradient in found], dim), len(table.names)


def plain(scores: torch.Tensor, target: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    own = scores.detach().clone().requires_grad_()
    loss = F.cross_entropy(own, target, **arguments)
    (loss * torch.arange(1, loss.numel() + 1).view(loss.shape)).sum().backward()
    assert own.grad is not None
    return loss.detach(), own.grad


@pytest.mark.parametrize("shape", [(7, CLASSES), (3, CLASSES, 4, 2), (CLASSES,)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_it_is_that_of_torch(
    shape: tuple[int, ...], reduction: str, smoothing: float, weighted: bool, size: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    target = torch.randint(CLASSES, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    if len(shape) > 1:
        target[1] = -5
        target.view(-1)[0] = 4
    weight = torch.rand(CLASSES, dtype=torch.float64, generator=generator) if weighted else None
    expected, gradient = plain(
        scores, target, weight=weight, reduction=reduction, ignore_index=-5, label_smoothing=smoothing
    )
    losses, found, exchanges = shared(size, scores, target, weight, REDUCTIONS[reduction], -5, smoothing)
    for loss in losses:
        assert torch.equal(loss, losses[0])
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)
    assert exchanges == 2


def test_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0] * 4, [-1e4] * CLASSES, [1e300] * CLASSES], dtype=torch.float64)
    target = torch.tensor([4, 11, 0])
    expected, gradient = plain(scores, target, reduction="none")
    losses, found, _ = shared(2, scores, target, None, 0)
    torch.testing.assert_close(losses[1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_the_mean_of_nothing_is_no_number() -> None:
    losses, _, _ = shared(2, torch.zeros(2, CLASSES), torch.tensor([-100, -100]))
    assert all(loss.isnan() for loss in losses)


def test_the_same_target_as_the_ignored_one_may_be_a_class() -> None:
    scores, target = torch.randn(4, CLASSES, dtype=torch.float64), torch.tensor([0, 3, 0, 8])
    expected, gradient = plain(scores, target, ignore_index=0)
    losses, found, _ = shared(3, scores, target, None, 1, 0)
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gives_the_type_that_torch_gives(autocast: bool) -> None:
    scores, target = torch.randn(6, CLASSES).bfloat16(), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, gradient = plain(scores, target)

    def work(group: ThreadShards) -> tuple[torch.Tensor, torch.Tensor]:
        own = own_part(scores, 1, [CLASSES], shards=2, shard=group.own).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(scope_of(group), "loss", own, target)
        loss.backward()
        assert own.grad is not None
        return loss.detach(), own.grad

    found, _ = run_shards(2, work)
    assert found[0][0].dtype == expected.dtype == (torch.float32 if autocast else torch.bfloat16)
    torch.testing.assert_close(found[0][0], expected, rtol=1e-2 if not autocast else 1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([part for _, part in found], 1), gradient, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_target_that_is_no_class_is_refused(wrong: int) -> None:
    with pytest.raises(RuntimeError, match="not one of the classes"):
        shared(2, torch.zeros(2, CLASSES), torch.tensor([0, wrong]))


def test_targets_that_are_probabilities_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be shared"):
        shared(2, torch.zeros(2, CLASSES), torch.zeros(2, CLASSES))
