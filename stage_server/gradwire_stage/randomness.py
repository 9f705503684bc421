"""Seeds the device's generator for random operators, by the rule of gradwire_protocol.randomness."""

from __future__ import annotations

import torch

from gradwire_protocol.randomness import draw_seed


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
        self._generator.manual_seed(draw_seed(self._seed, step, micro_batch, node))
