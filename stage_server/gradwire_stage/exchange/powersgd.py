"""powersgd: a matrix's gradient goes as two thin factors, with what they leave out kept for the next step.

Vogels et al., PowerSGD: Practical Low-Rank Gradient Compression (2019): one step of power iteration that starts from
the factor of the step before. Both factors are linear in the gradients, so that a ring adds them up, and their product
approximates the sum. Vectors, and matrices whose factors are not much smaller, go along with the first as they are.

In the first steps gradients change fast, and there is nothing to start from: they can go as they are (`warm_up`).

The paper keeps what its gradient has beyond the mean of all; here each keeps what its own factors leave out. The sum is
the same, but replicas that get unequal shares of a batch would drift apart without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from gradwire_protocol.gradient_codecs import GradientCodec, matrix_shape
from gradwire_stage.exchange import collectives
from gradwire_stage.exchange.collectives import Group, Steps
from gradwire_stage.exchange.feedback import drop_infinite, work_type
from gradwire_stage.exchange.same_bits import orthonormal, product

_SEED = 20190531


class PowerSgd:
    """The reducer of powersgd (`reducers.Reducer`). Factors travel in the work type."""

    def __init__(self, codec: GradientCodec, shapes: Sequence[torch.Size]) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        self._warm_up = codec.warm_up
        self._sizes = [shape.numel() for shape in shapes]
        # By the tensor's place in the bucket; the others go as they are.
        self._matrices = {
            place: _Matrix(*matrix, codec.rank, generator)
            for place, shape in enumerate(shapes)
            if (matrix := matrix_shape(shape, codec.rank)) is not None
        }

    def all_reduce(self, group: Group, gradient: torch.Tensor, step: int) -> Steps[torch.Tensor]:
        if len(group.members) == 1 or not self._matrices or step < self._warm_up:
            exact = yield from collectives.all_reduce(group, gradient)
            return exact
        parts = torch.split(gradient, self._sizes)
        work = work_type(gradient.dtype)
        first = [
            self._matrices[place].left(part) if place in self._matrices else part.to(work)
            for place, part in enumerate(parts)
        ]
        summed = yield from collectives.all_reduce(group, _joined(first), "p")
        lefts = torch.split(summed, [part.numel() for part in first])
        second = [matrix.right(lefts[place]) for place, matrix in self._matrices.items()]
        summed = yield from collectives.all_reduce(group, _joined(second), "q")
        rights = iter(torch.split(summed, [part.numel() for part in second]))
        total = torch.empty(gradient.shape, dtype=work, device=gradient.device)
        for place, part in enumerate(torch.split(total, self._sizes)):
            if place in self._matrices:
                self._matrices[place].product(next(rights), part)
            else:
                part.copy_(lefts[place])
        return total.to(gradient.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{place}": tensor for place, matrix in self._matrices.items() for name, tensor in matrix.state()
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        for place, matrix in self._matrices.items():
            residual, right = (state.get(f"{name}.{place}") for name in ("residual", "right"))
            if residual is not None:
                matrix.restore(residual, right)


class _Matrix:
    """One matrix of a bucket: what it keeps, and the steps of its compression in their order."""

    def __init__(self, rows: int, columns: int, rank: int, generator: torch.Generator) -> None:
        self._shape = (rows, columns)
        self._rank = rank
        # Where the power iteration begins, and begins again in directions that it has lost.
        self._start = torch.randn(columns, rank, generator=generator)
        self._residual: torch.Tensor | None = None  # (rows, columns)
        self._right = torch.zeros(columns, rank)
        self._basis = torch.zeros(rows, rank)

    def left(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the own left factor, flat."""
        if self._residual is None:
            self._residual = gradient.new_zeros(self._shape, dtype=work_type(gradient.dtype))
            self._start, self._right = self._start.to(self._residual), self._right.to(self._residual)
        self._residual += gradient.view(self._shape)
        lost = (self._right == 0).all(dim=0)
        return (self._residual @ torch.where(lost, self._start, self._right)).view(-1)  # (rows, rank)

    def right(self, left: torch.Tensor) -> torch.Tensor:
        """Return the own right factor for the sum of the left ones, flat; keep what the two leave out."""
        if self._residual is None:
            raise RuntimeError("a matrix has a left factor first")
        self._basis = orthonormal(left.view(-1, self._rank))
        right = self._residual.T @ self._basis  # (columns, rank)
        self._residual.addmm_(self._basis, right.T, alpha=-1)
        drop_infinite(self._residual)
        return right.view(-1)

    def product(self, right: torch.Tensor, out: torch.Tensor) -> None:
        """Write the approximation of the sum to `out`, flat, for the sum of the right factors."""
        right = right.view(-1, self._rank)
        product(self._basis, right, out.view(self._shape))
        self._right = right.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def restore(self, residual: torch.Tensor, right: torch.Tensor | None) -> None:
        """Go on from what `state` gave; a right factor of another rank begins anew."""
        self._residual = residual.reshape(self._shape).clone()
        self._start, self._right = self._start.to(self._residual), self._right.to(self._residual)
        if right is not None and right.shape == self._right.shape:
            self._right = right.to(self._residual)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._residual is not None:
            yield from (("residual", self._residual), ("right", self._right))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.view(-1) for part in parts])
