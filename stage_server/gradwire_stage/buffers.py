"""Versions of the buffers that a segment writes to: immutable, one for each pass that changed them.

Operators saved for the backward pass of one micro-batch must not see what the next one writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch


class BufferVersions:
    """Gives a pass its own copies of the buffers that it writes to, and stores them when it is through."""

    def __init__(self, store: MutableMapping[str, torch.Tensor], written: Iterable[str]) -> None:
        self._store = store
        self._written = tuple(written)

    def begin(self) -> dict[str, torch.Tensor]:
        """Copy the newest versions, for a pass to write to."""
        return {name: self._store[name].clone() for name in self._written}

    def commit(self, written: Mapping[str, torch.Tensor], assigned: Mapping[str, torch.Tensor]) -> None:
        """Make what a pass wrote in place, and then what it assigned, the newest versions."""
        for name, tensor in (*written.items(), *assigned.items()):
            self._store[name] = tensor.detach()
