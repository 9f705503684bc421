"""The rule by which random operators are seeded: the same numbers on every layout, in recomputation and in replay.

Leaves to its users the generator: a stage server's, or that of the process that a comparison runs in.
"""

from __future__ import annotations

import hashlib
import struct
import zlib


def node_number(name: str) -> int:
    """Return the number that stands for a node in its seeds: the crc32 of its name."""
    return zlib.crc32(name.encode())


def draw_seed(seed: int, step: int, micro_batch: int, node: int) -> int:
    """Return what to seed the generator with, before one call of the node with this `node_number`.

    seed: of the run. micro_batch: its index in the step, over all replicas.
    """
    words = struct.pack("<QQQQ", seed, step, micro_batch, node)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
