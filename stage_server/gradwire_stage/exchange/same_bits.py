"""Two steps of linear algebra whose results have the same bits on every machine.

Libraries add up in orders that differ between processors, thread counts and even addresses. Here everything is either
arithmetic of elements in a fixed order, which rounds alike everywhere, or a sum of whole numbers, exact in any order.
"""

from __future__ import annotations

import torch

# A column that keeps less than this of itself beside those before it is taken for a combination of them.
_DEPENDENT = 1e-4
# Of the whole numbers that stand for numbers of about 1.
_FRACTION_BITS = 40
# Rows are done in parts that stay in the cache of a processor.
_PART_ELEMENTS = 2**16


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Return orthonormal columns that span the same; 0 in place of those that depend on others. (rows, rank)

    Gram-Schmidt, modified. A column with NaN or infinities becomes NaN.
    """
    basis = columns.T.contiguous()  # (rank, rows)
    largest = basis.abs().amax(dim=1, keepdim=True)
    finite = largest.isfinite()
    # Magnitudes of 1 at most: no square overflows, and whole numbers can stand for them.
    basis = torch.where(finite, basis / _or_one(largest), 0.0)
    before = _sum(basis * basis).sqrt_()
    for place, column in enumerate(basis):
        norm = _sum(column * column).sqrt_()
        column /= _or_one(norm)
        column.masked_fill_(norm <= _DEPENDENT * before[place], 0.0)
        others = basis[place + 1 :]
        others -= _sum(others * column)[:, None] * column
    return basis.masked_fill_(~finite, torch.nan).T


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write left · rightᵀ to `out`, and return it. left: (rows, rank), right: (columns, rank), out: (rows, columns)."""
    factors = right.T.contiguous()  # (rank, columns)
    rows = max(1, _PART_ELEMENTS // out.shape[1]) if out.is_cpu else out.shape[0]
    term = torch.empty_like(out[:rows])
    for part, values in zip(torch.split(out, rows), torch.split(left, rows), strict=True):
        torch.mul(values[:, :1], factors[0], out=part)
        for rank in range(1, len(factors)):
            part += torch.mul(values[:, rank : rank + 1], factors[rank], out=term[: len(part)])
    return out


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sums over the last dimension, of products of columns: their magnitudes add up to its size at most."""
    units = 2.0 ** min(_FRACTION_BITS, 62 - values.shape[-1].bit_length())
    return (values * units).to(torch.int64).sum(dim=-1).to(values.dtype) / units


def _or_one(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values == 0, 1.0, values)
