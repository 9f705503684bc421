"""Seconds and bytes as people read them: three digits and a unit, which a column can have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A unit, and how many seconds or bytes one of it is."""

    name: str
    size: float

    def show(self, value: float) -> str:
        """Return the number of these units in a value, without their name: "1.25", "12.5", "1,250"."""
        number = value / self.size
        if number == 0:
            return "0"
        digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
        return f"{number:,.{0 if self.size == 1 and self.name == 'B' else digits}f}"


_SECONDS = (Unit("µs", 1e-6), Unit("ms", 1e-3), Unit("s", 1.0))
_BYTES = (Unit("B", 1.0), *(Unit(name, 1024.0**power) for power, name in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)))


def seconds_unit(values: Iterable[float]) -> Unit:
    """Return the unit in which the largest of the values has a digit before the point."""
    return _unit(_SECONDS, values)


def bytes_unit(values: Iterable[float]) -> Unit:
    """Return the unit in which the largest of the values has a digit before the point."""
    return _unit(_BYTES, values)


def shown_seconds(seconds: float) -> str:
    """Return "1.25 s", "12.5 ms", "0.80 µs"; "0"."""
    unit = seconds_unit([seconds])
    return f"{unit.show(seconds)} {unit.name}" if seconds else "0"


def shown_bytes(size: float) -> str:
    """Return "12.5 MiB"; "0"."""
    unit = bytes_unit([size])
    return f"{unit.show(size)} {unit.name}" if size else "0"


def _unit(units: Iterable[Unit], values: Iterable[float]) -> Unit:
    largest = max(values, default=0.0)
    first, *larger = units
    for unit in larger:
        if largest >= 0.9995 * unit.size:
            first = unit
    return first
