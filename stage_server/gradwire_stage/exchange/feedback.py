"""Error feedback: what a lossy codec did not send in one step is added to what it sends in the next.

So nothing is lost for good: over many steps the sums that replicas get add up to the sums that they should have got.
As in Seide et al., 1-Bit Stochastic Gradient Descent (2014), and Karimireddy et al., Error Feedback Fixes SignSGD
(2019).
"""

from __future__ import annotations

import torch


def work_type(data_type: torch.dtype) -> torch.dtype:
    """Return the type in which sums are made and remainders kept: small ones would vanish in half precision."""
    return torch.float64 if data_type == torch.float64 else torch.float32


class Kept:
    """A flat buffer that a reducer keeps from step to step; zeros at first, made when the first gradient is there."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def like(self, gradient: torch.Tensor, multiple: int = 1) -> torch.Tensor:
        """Return the buffer: the gradient's size, up to a multiple of so many elements, in the work type."""
        if self._buffer is None:
            size = -(-gradient.numel() // multiple) * multiple
            self._buffer = gradient.new_zeros(size, dtype=work_type(gradient.dtype))
        return self._buffer

    def put(self, flat: torch.Tensor, multiple: int = 1) -> None:
        """Have the buffer hold this, as it was kept before; zeros up to the multiple."""
        size = -(-flat.numel() // multiple) * multiple
        self._buffer = flat.new_zeros(size)
        self._buffer[: flat.numel()] = flat

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Return the buffer under a name, once it is there."""
        return {} if self._buffer is None else {name: self._buffer}


def keep_difference(wanted: torch.Tensor, sent: torch.Tensor, kept: torch.Tensor) -> None:
    """Write to `kept` what was wanted and not sent.

    What is not finite is not kept: the step that has it is lost anyway, those after it need not be.
    """
    torch.sub(wanted, sent, out=kept)
    drop_infinite(kept)


def drop_infinite(kept: torch.Tensor) -> None:
    """Set what is infinite or NaN to 0."""
    kept.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
