"""Seeds random operators so that they draw the same numbers on every layout, in recomputation and in replay."""

from __future__ import annotations

import hashlib
import struct
import zlib

import torch


class Randomness:
    """Seeds the device's generator from (seed, step, micro-batch, node).

    The generator is the process's own: one compute thread a process.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generator = torch.cuda.default_generators[index]
        else:
            self._generator = torch.default_generator

    def seed(self, step: int, micro_batch: int, node: int) -> None:
        """Seed for one call of the node with this `node_number`."""
        words = struct.pack("<QQQQ", self._seed, step, micro_batch, node)
        self._generator.manual_seed(int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little"))


def node_number(name: str) -> int:
    """The number that stands for a node in its seeds: the crc32 of its name."""
    return zlib.crc32(name.encode())
