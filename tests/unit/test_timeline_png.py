"""The picture of a step as pixels: a PNG file of the right size whose actions have their colours and places."""

from __future__ import annotations

import builtins
import io
import struct
from typing import Any

import pytest
from matplotlib import image

from gradwire.timeline_drawing import BAR, LEFT, RIGHT, TOP, WIDTH, TimedAction
from gradwire.timeline_png import png_timeline
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.program import parse_action

STEP = [TimedAction(0, parse_action("0F0"), 0.0, 1.0), TimedAction(0, parse_action("0B0"), 1.0, 4.0)]


def test_the_picture_has_what_the_step_has() -> None:
    content = png_timeline(STEP, "a title", "a line")
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    scale = width / WIDTH
    pixels = image.imread(io.BytesIO(content))
    assert pixels.shape[:2] == (height, width)

    def colour(share: float) -> str:
        """Of the bar, at a share of the step; at its upper rim, where no number is."""
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        red, green, blue = (round(255 * part) for part in pixels[round((TOP + 4) * scale), round(x * scale)][:3])
        return f"#{red:02x}{green:02x}{blue:02x}"

    assert [colour(share) for share in (0.1, 0.2, 0.3, 0.9)] == ["#0b2fa0", "#0b2fa0", "#1f9d3a", "#1f9d3a"]
    assert BAR * scale > 40  # a number can be read
    assert png_timeline([]).startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SettingsError) as caught:
        png_timeline(STEP)
    assert 'pip install "gradwire[plot]"' in caught.value.remedy
