"""bfloat16: two bytes an element, the range of float32, a relative error of 2⁻⁸ at most.

What rounds beyond float32's range becomes infinite, as in any conversion to bfloat16; infinities and NaN stay.
"""

from __future__ import annotations

import torch


def encode(elements: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the elements rounded to bfloat16, to nearest even."""
    return elements.to(torch.bfloat16).view(torch.uint8)


def decode(payload: torch.Tensor, data_type: torch.dtype) -> torch.Tensor:
    """Return the elements in the type wanted."""
    return payload.view(torch.bfloat16).to(data_type)
