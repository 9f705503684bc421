"""Codecs of the gradients that replicas exchange: their names and settings as text, and the bytes that each sends.

Imports no torch, so that clients and the coordinator can check and plan with them. The arithmetic is the stage servers'
(gradwire_stage.exchange).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import NoReturn

from gradwire_protocol.codecs import int8_blocks
from gradwire_protocol.errors import PlanError

# Of sparse indices: within a block two bytes tell an element.
INDEX_BLOCK = 65536
# A matrix goes as two factors only where these are this many times smaller; else the loss would buy too little.
SMALLEST_GAIN = 2

_FACTOR_BYTES = 4
_HALF_BYTES = 2
_SCALE_BYTES = 4
_LONGEST_TEXT = 200
_LARGEST_COUNT = 10**9
_EXPECTED = (
    'one of "none", "fp16", "bf16", "int8", "topk(density=0.01, momentum=0.0, warm_up=0)", '
    '"powersgd(rank=4, warm_up=0)", where any setting may be left out'
)


@dataclass(frozen=True, slots=True)
class GradientCodec:
    """A codec and its settings. Those of other codecs have their defaults, so that equal codecs compare equal."""

    name: str
    _: KW_ONLY
    # topk: share of the elements that each replica sends in a step.
    density: float = 0.01
    # topk: of momentum correction, in place of the optimizer's own; 0 for none.
    momentum: float = 0.0
    # topk: steps over which the density falls from a quarter to `density`. powersgd: first steps that go without it.
    warm_up: int = 0
    # powersgd: columns of each factor.
    rank: int = 4

    @property
    def lossy(self) -> bool:
        """Whether replicas get anything else than the sum of their gradients."""
        return self.name != "none"

    def __str__(self) -> str:
        """Return the text that parses to the same codec: of the settings the first, and what is not at its default."""
        defaults = {field.name: field.default for field in fields(self)}
        shown = [
            f"{setting}={getattr(self, setting)!r}"
            for position, setting in enumerate(_SETTINGS[self.name])
            if position == 0 or getattr(self, setting) != defaults[setting]
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True, slots=True)
class _Setting:
    read: Callable[[str], float | int]
    allowed: Callable[[float], bool]
    expected: str


_DENSITY = _Setting(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
_MOMENTUM = _Setting(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
_WARM_UP = _Setting(int, lambda value: 0 <= value <= _LARGEST_COUNT, "a whole number of steps, 0 or more")
_RANK = _Setting(int, lambda value: 1 <= value <= _LARGEST_COUNT, "a whole number, 1 or more")
_SETTINGS: dict[str, dict[str, _Setting]] = {
    "none": {},
    "fp16": {},
    "bf16": {},
    "int8": {},
    "topk": {"density": _DENSITY, "momentum": _MOMENTUM, "warm_up": _WARM_UP},
    "powersgd": {"rank": _RANK, "warm_up": _WARM_UP},
}
GRADIENT_CODEC_NAMES = tuple(_SETTINGS)
# In a plan: chosen when a run is created, from what the links between replicas were measured to carry.
AUTO = "auto"


def parse_compression(text: str) -> GradientCodec:
    """Return the codec that a text names, as in `topk(density=0.01)`; PlanError where there is none such."""
    whole = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text, re.ASCII) if len(text) <= _LONGEST_TEXT else None
    if whole is None or whole[1] not in _SETTINGS:
        _refuse(text, _EXPECTED, text)
    name, known = whole[1], _SETTINGS[whole[1]]
    values: dict[str, float | int] = {}
    for part in (whole[2] or "").split(",") if (whole[2] or "").strip() else ():
        setting, _, value = (piece.strip() for piece in part.partition("="))
        if setting not in known:
            _refuse(text, f"of {name} the settings: {', '.join(known) or 'none'}", part.strip())
        if setting in values:
            _refuse(text, f"{setting} once", f"{setting} twice")
        values[setting] = _value(text, setting, value, known[setting])
    return GradientCodec(name=name, **values)  # type: ignore[arg-type]


def encoded_bytes(codec: GradientCodec, shape: Sequence[int], element_bytes: int) -> int:
    """Return the bytes that one tensor's gradient takes on the wire: payload with scales and indices, no headers.

    none, fp16, bf16, int8: of the tensor once; a ring of R replicas sends 2 (R − 1) / R times this from each. Exact for
    a chunk of the ring; buckets put small tensors into the same blocks, so that these take less.
    powersgd: of both factors, or of the tensor where it goes dense; the factor of the ring is the same.
    topk: of what one replica has to say of the tensor, after warm-up, at most; each sends R − 1 times this.
    """
    elements = math.prod(shape)
    if elements == 0:
        return 0
    match codec.name:
        case "fp16" if element_bytes > _HALF_BYTES:
            return _SCALE_BYTES + _HALF_BYTES * elements
        case "bf16" if element_bytes > _HALF_BYTES:
            return _HALF_BYTES * elements
        case "int8":
            return _SCALE_BYTES * int8_blocks(elements) + elements
        case "topk":
            count = top_count(elements, codec.density)
            return index_bytes(elements, count) + min(element_bytes, _FACTOR_BYTES) * count
        case "powersgd":
            matrix = matrix_shape(shape, codec.rank)
            numbers = elements if matrix is None else codec.rank * sum(matrix)
            return max(element_bytes, _FACTOR_BYTES) * numbers
    return element_bytes * elements


def top_count(elements: int, density: float) -> int:
    """Return how many of so many elements a sparse codec sends at most: one at least, so that every tensor moves."""
    return min(elements, max(1, round(density * elements)))


def index_bytes(elements: int, count: int) -> int:
    """Return the bytes of the indices of `count` among `elements`: two each and four a block, or four each if less."""
    blocks = -(-elements // INDEX_BLOCK)
    return min(2 * count + 4 * blocks, 4 * count)


def matrix_shape(shape: Sequence[int], rank: int) -> tuple[int, int] | None:
    """Return the rows and columns that a tensor has as a matrix; None if factors of this rank do not pay for it."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if 0 < SMALLEST_GAIN * rank * (rows + columns) <= rows * columns else None


def _value(text: str, name: str, value: str, setting: _Setting) -> float | int:
    try:
        number = setting.read(value)
    except ValueError:
        number = math.nan
    if not setting.allowed(number):
        _refuse(text, f"for {name} {setting.expected}", value or "nothing")
    return number


def _refuse(text: str, expected: str, got: str) -> NoReturn:
    raise PlanError(
        f"compression {text[:_LONGEST_TEXT]!r} is not valid",
        expected=expected,
        got=got[:_LONGEST_TEXT],
        remedy='write it as in compression="int8" or compression="topk(density=0.01)"',
    )
