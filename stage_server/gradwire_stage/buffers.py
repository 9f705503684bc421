"""Versions of the buffers that a segment writes to: immutable, one for each pass that changed them.

Operators saved for the backward pass of one micro-batch must not see what the next one writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch


class BufferVersions:
    """Gives a pass its own copies of the buffers that it writes to, and stores what it made of them."""

    def __init__(self, store: MutableMapping[str, torch.Tensor], written: Iterable[str]) -> None:
        self._store = store
        self._written = tuple(written)

    def copies(self, versions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy the versions that a pass starts from, for it to write to."""
        return {name: versions[name].clone() for name in self._written}

    def commit(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Make what a pass wrote or assigned the newest versions."""
        for name, tensor in changed.items():
            self._store[name] = tensor.detach()
