"""Seconds and bytes as people read them."""

from __future__ import annotations

import pytest

from gradwire.units import bytes_unit, seconds_unit, shown_bytes, shown_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"),
        (3e-7, "0.30 µs"),
        (4.2e-4, "420 µs"),
        (0.0099951, "10.0 ms"),
        (0.638, "638 ms"),
        (0.9996, "1.00 s"),
        (12345.6, "12,346 s"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert shown_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (17, "17 B"), (1024, "1.00 KiB"), (10 * 2**20 + 2**19, "10.5 MiB"), (3 * 2**40, "3.00 TiB")],
)
def test_bytes(size: int, text: str) -> None:
    assert shown_bytes(size) == text


def test_a_column_has_one_unit() -> None:
    sizes = [2**20, 2**33, 0]
    unit = bytes_unit(sizes)
    assert unit.name == "GiB"
    assert [unit.show(size) for size in sizes] == ["0.00", "8.00", "0"]
    assert seconds_unit([]).show(0.0) == "0"
