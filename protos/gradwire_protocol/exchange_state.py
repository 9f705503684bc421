"""What a server keeps from step to step to agree with other replicas, in bytes. Pure.

Planning counts with it, and stage servers check with it, as with the optimizer's state (optimizer_state.py). In
checkpoints it lies beside that, under names that say whose it is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gradwire_protocol.frames import ELEMENT_BYTES
from gradwire_protocol.gradient_codecs import GradientCodec
from gradwire_protocol.v1 import graph_pb2

# Sums and what is still owed are in float32 at least.
_LEAST_ELEMENT_BYTES = 4
# Of local steps: the weights that all agreed on last, and the outer optimizer's velocities.
_AGREED_TENSORS = 2


@dataclass(frozen=True)
class ExchangeState:
    """Of one way to agree."""

    codec: GradientCodec
    local_steps: bool = False

    def bytes_for(self, spec: graph_pb2.TensorSpec) -> int:
        """Return what is kept for a parameter that trains; of powersgd at most, since small tensors go as they are."""
        elements, element_bytes = math.prod(spec.shape), ELEMENT_BYTES[spec.data_type]
        kept = elements * max(element_bytes, _LEAST_ELEMENT_BYTES) * self._owed()
        return kept + (_AGREED_TENSORS * elements * element_bytes if self.local_steps else 0)

    def _owed(self) -> int:
        """Return how many tensors of a gradient's size the codec keeps."""
        if not self.codec.lossy:
            return 0
        return 2 if self.codec.momentum else 1


# How many values a codec keeps of one parameter, at most.
_OF_CODEC = 2
# How many a replica keeps of one, at most, besides an optimizer's state: under local steps its own weights, too.
MAXIMUM_OWED = _OF_CODEC + _AGREED_TENSORS + 1
# What local steps keep is of use to no other exchange.
LOCAL_PREFIX = "local."
_NAME = re.compile(r"exchange(\d{1,6})\.((?:local\.(?:(?:codec|optimizer)\.)?)?[A-Za-z0-9_]{1,32})")


def owed_name(replica: int, what: str) -> str:
    """Return the name, among a parameter's optimizer state, of what a replica keeps of it."""
    return f"exchange{replica}.{what}"


def parse_owed_name(state: str) -> tuple[int, str] | None:
    """Return (replica, what) for such a name; None for the name of a value of the optimizer's state."""
    match = _NAME.fullmatch(state)
    return None if match is None else (int(match[1]), match[2])


# Of a server without other replicas.
ALONE = ExchangeState(GradientCodec("none"))
