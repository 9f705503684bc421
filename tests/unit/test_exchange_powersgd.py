"""powersgd: what it gets right, what replicas keep, and its linear algebra."""

from __future__ import annotations

import pytest
import torch
from exchange_driver import Replicas, exact_sum, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_stage.exchange.same_bits import orthonormal, product


def test_powersgd_gets_a_matrix_of_low_rank_right_and_finds_lost_directions_again() -> None:
    group = Replicas("powersgd(rank=2)", 3, (24, 40), (7,))
    generator = torch.Generator().manual_seed(5)
    for rank in (2, 1, 0, 2):
        gradients = [
            torch.cat(
                [
                    (torch.randn(24, rank, generator=generator) @ right).flatten(),
                    torch.randn(7, generator=generator),
                ]
            )
            for right in [torch.randn(rank, 40, generator=generator)]
            for _ in group.members
        ]
        result, expected = group.reduce(gradients), exact_sum(gradients)
        assert torch.allclose(result.double(), expected, atol=1e-4 * float(expected.abs().amax()) + 1e-6)


def test_powersgd_leaves_the_first_steps_as_they_are() -> None:
    group = Replicas("powersgd(rank=1, warm_up=3)", 2, (24, 40))
    generator = torch.Generator().manual_seed(1)
    exact = []
    for _ in range(5):
        gradients = [torch.randn(group.size, generator=generator) for _ in group.members]
        exact.append(torch.allclose(group.reduce(gradients).double(), exact_sum(gradients), rtol=1e-5, atol=1e-5))
    assert exact == [True, True, True, False, False]


def test_powersgd_keeps_unequal_replicas_together() -> None:
    """What a replica keeps is bounded by its own gradient, however unlike the others' it is."""
    group = Replicas("powersgd(rank=2)", 2, (24, 40))
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(group.size, generator=generator)
    for _ in range(100):
        noise = 0.1 * torch.randn(group.size, generator=generator)
        group.reduce([3 * mean + noise, torch.zeros(group.size)])
    # The other one has nothing to keep.
    assert float(group.reducers[1].state()["residual.0"].norm()) == 0
    assert float(group.reducers[0].state()["residual.0"].norm()) < 100 * float(mean.norm())


@given(
    rows=st.integers(1, 60),
    rank=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from((torch.float64, torch.float32)),
)
@settings(deadline=None, max_examples=60)
def test_orthonormal_columns(rows: int, rank: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(rows, rank, generator=generator, dtype=dtype)
    columns[:, rank // 2] = 3e30 * columns[:, 0]
    basis = orthonormal(columns)
    gram = basis.T @ basis
    present = (basis != 0).any(dim=0)
    assert torch.allclose(gram, torch.diag(present.to(dtype)), atol=2e-2)
    # Nothing of the columns is left beside the basis, but where they all but depend on each other.
    columns = columns / columns.norm(dim=0)
    assert float((columns - basis @ (basis.T @ columns)).abs().amax()) < 2e-2


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (700, 300, 4), (2, 70000, 3)])
def test_products_in_parts(shape: tuple[int, int, int]) -> None:
    rows, columns, rank = shape
    left, right = torch.randn(rows, rank), torch.randn(columns, rank)
    found = product(left, right, torch.empty(rows, columns))
    assert torch.allclose(found, left @ right.T, atol=1e-4)
    terms = [left[:, place : place + 1] * right[:, place] for place in range(rank)]
    assert same_bits(found, sum(terms[1:], terms[0]))
