"""float16: two bytes an element, a relative error of 2⁻¹¹ at most, between 6e-5 and 65,504.

Below that the error is 2⁻²⁵ at most; magnitudes from 65,520 on become infinite, rather than wrong without a sign of it.
Infinities and NaN stay.
"""

from __future__ import annotations

import torch


def encode(elements: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the elements rounded to float16, to nearest even."""
    return elements.to(torch.float16).view(torch.uint8)


def decode(payload: torch.Tensor, data_type: torch.dtype) -> torch.Tensor:
    """Return the elements in the type wanted."""
    return payload.view(torch.float16).to(data_type)
