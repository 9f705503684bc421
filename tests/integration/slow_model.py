"""A model whose forward pass takes as long as one likes, and no processor: for what happens in the middle of an action.

Imported by tests, whose servers are in the same process, and by clients that tests start.
"""

from __future__ import annotations

import threading
import time

import torch
from torch import nn

SIZE = 8


@torch.library.custom_op("gradwire_test::nap", mutates_args=())
def nap(x: torch.Tensor) -> torch.Tensor:
    """Its argument, a tenth of a second later: in a server's thread, not where an export is compared with its model."""
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.1)
    return x.clone()


@nap.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


# As a server is given its custom operators.
NAP = {"gradwire_test.nap.default": torch.ops.gradwire_test.nap.default}


class Slow(nn.Module):
    """Naps in the forward pass of its second half, a tenth of a second each."""

    def __init__(self, naps: int) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE)
        self.second = nn.Linear(SIZE, 4)
        self.naps = naps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.second(torch.tanh(self.first(x)))
        rested = scores.detach()
        for _ in range(self.naps):
            rested = nap(rested)
        return scores + rested * 0
