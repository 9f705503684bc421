"""Draws the same picture of a step as the SVG, as a PNG file: with matplotlib, which is an extra.

Leaves to others: what is drawn, and in which colours (`timeline_drawing.py`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradwire.timeline_drawing import (
    BAR,
    FOOT,
    LEFT,
    PALER,
    RIGHT,
    ROW,
    TOP,
    WIDTH,
    TimedAction,
    Timeline,
    ink,
    picture_label,
)
from gradwire_protocol.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY, _ROW = "#555555", "#eef0f3"
# matplotlib counts in points: with 72 dots an inch each is a pixel. Twice as many make letters smooth.
_POINTS, _SCALE = 72, 2


def check_available() -> None:
    """SettingsError if this process cannot draw PNG files."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "PNG files need matplotlib, which is not installed",
            expected="the extra that brings it",
            got=str(error),
            remedy='python -m pip install "gradwire[plot]", or ask for SVG instead',
        ) from None


def png_timeline(timed: Sequence[TimedAction], title: str = "", subtitle: str = "") -> bytes:
    """Return the picture as a PNG file; SettingsError without matplotlib. See `svg_timeline`."""
    check_available()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    line = Timeline(timed)
    bottom = TOP + ROW * len(line.servers)
    height, right = bottom + FOOT, WIDTH - RIGHT
    figure = Figure(figsize=(WIDTH / _POINTS, height / _POINTS), dpi=_POINTS * _SCALE, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)  # as in the SVG, downwards
    _write(axes, LEFT, 18, title, size=17, weight="bold", ha="left")
    _write(axes, LEFT, 41, subtitle, color=_GREY, ha="left")
    scale = (right - LEFT) / line.seconds if line.seconds else 0.0
    for server, top in zip(line.servers, range(TOP, bottom, ROW), strict=True):
        _bar(axes, LEFT, top, right - LEFT, _ROW)
        _write(axes, LEFT - 10, top + BAR / 2, f"server {server}", ha="right")
        _write(axes, right + 10, top + BAR / 2, line.busy_share(server), ha="left")
    for tick, label in line.ticks(8):
        x = LEFT + tick * scale
        axes.plot((x, x), (TOP - 4, bottom), color="#c3c8cf", linewidth=0.7, zorder=1.5)
        _write(axes, x, bottom + 11, label, color=_GREY)
    for server, top in zip(line.servers, range(TOP, bottom, ROW), strict=True):
        for item in line.row(server):
            x, width, fill = LEFT + item.start * scale, (item.end - item.start) * scale, line.fill(item.action)
            _bar(axes, x, top, width, fill)
            _write(axes, x + width / 2, top + BAR / 2, picture_label(item.action, width), color=ink(fill), size=12)
    x = float(LEFT)
    for _, look in line.looks():
        _bar(axes, x, bottom + 32, 14, look.fill, height=14)
        _write(axes, x + 20, bottom + 39, look.word, ha="left")
        x += 46 + 7 * len(look.word)
    if line.paler_stages:
        _write(axes, x, bottom + 39, PALER, color=_GREY, ha="left")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _bar(
    axes: Axes, x: float, y: float, width: float, fill: str, *, height: float = BAR, edge: str = "#ffffff"
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=0.8, zorder=2 if fill != _ROW else 1)
    )


def _write(axes: Axes, x: float, y: float, text: str, *, size: float = 13, ha: str = "center", **look: Any) -> None:
    axes.text(x, y, text, fontsize=size, ha=ha, va="center_baseline", zorder=3, **look)
