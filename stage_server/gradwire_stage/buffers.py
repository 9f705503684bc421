"""Versions of the buffers that a segment writes to: immutable, one for each pass that changed them.

Operators saved for the backward pass of one micro-batch must not see what the next one writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch


class BufferVersions:
    """Gives a pass its own copies of the buffers that it writes to, and stores what it made of them."""

    def __init__(self, store: MutableMapping[str, torch.Tensor], written: Iterable[str]) -> None:
        self._store = store
        self._written = frozenset(written)

    def copies(self, names: Sequence[str], versions: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy, of the tensors that a pass starts from, those that it writes to."""
        if not self._written:
            return {}
        return {name: tensor.clone() for name, tensor in zip(names, versions, strict=True) if name in self._written}

    def commit(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Make what a pass wrote or assigned the newest versions."""
        for name, tensor in changed.items():
            self._store[name] = tensor.detach()
