"""Draws who does what when in a step: coloured text for a terminal, and SVG.

Pure: timed actions go in. Leaves to others: where the times come from, a plan's prediction or a measured step, and
writing files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from rich.text import Text

from gradwire_protocol.program import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NORM,
    OF_MICRO_BATCH,
    REDUCE,
    UPDATE,
    WEIGHT_GRADIENT,
    Action,
)


class TimedAction(NamedTuple):
    """An action of a server, with its seconds from the start of the step."""

    server: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class _Look:
    """How a kind of action looks: fill, and a paler one for every second stage of a server; what it is called."""

    fill: str
    paler: str
    word: str


# Also where a terminal has 16 colours only, each becomes another one of them.
_REST = _Look("#7a7a7a", "#7a7a7a", "reduce, norm, update")
_LOOKS = {
    FORWARD: _Look("#0b2fa0", "#6a86ff", "forward"),
    BACKWARD: _Look("#1f9d3a", "#6fd585", "backward"),
    INPUT_GRADIENT: _Look("#159f9f", "#66d9d9", "input gradient"),
    WEIGHT_GRADIENT: _Look("#c9881b", "#f0cf6a", "weight gradient"),
    REDUCE: _REST,
    NORM: _REST,
    UPDATE: _REST,
}
_PALER = "paler: every second stage of a server"
_LEAST_COLUMNS = 10

# Of the SVG, in pixels.
_WIDTH, _ROW, _BAR, _LEFT, _RIGHT, _TOP = 960, 30, 24, 84, 64, 34
_LEAST_LABEL = 13


def text_timeline(timed: Sequence[TimedAction], width: int) -> Text:
    """Return a line a server of `width` columns at most, an axis and a legend.

    An action begins and ends in the nearest column, and has its micro-batch's number where there is room; `·` is a
    bubble. Colours say the kind, and are paler on every second stage of a server; the percentage is
    the share of the step that a server is busy.
    """
    servers, length = _servers(timed), _length(timed)
    names = [f"server {server}" for server in servers]
    shares = [f"{_busy(timed, server) / length:4.0%}" if length else "" for server in servers]
    columns = max(_LEAST_COLUMNS, width - max(map(len, names), default=0) - max(map(len, shares), default=0) - 4)
    paler = _paler_stages(timed)
    text = Text(no_wrap=True)
    for server, name, share in zip(servers, names, shares, strict=True):
        text.append(f"{name} │")
        at = 0
        for item in sorted((item for item in timed if item.server == server), key=lambda item: item.start):
            first, behind = (round(seconds / length * columns) if length else 0 for seconds in (item.start, item.end))
            if behind <= max(at, first):
                continue  # too short to be seen
            first = max(at, first)
            text.append("·" * (first - at), "dim")
            look = _LOOKS[item.action.kind]
            fill = look.paler if item.action.stage in paler else look.fill
            text.append(_label(item.action, behind - first), f"{_ink(fill)} on {fill}")
            at = behind
        text.append("·" * (columns - at), "dim")
        text.append(f"│{share}\n")
    text.append(_axis(length, columns, max(map(len, names), default=0) + 2) + "\n")
    for look in _looks(timed):
        text.append("  ")
        text.append("  ", f"on {look.fill}")
        text.append(f" {look.word}")
    text.append("  ·· idle" + (f"  {_PALER}" if paler else ""))
    return text


def svg_timeline(timed: Sequence[TimedAction], title: str = "") -> str:
    """Return the picture as an SVG document: a row a server, with the share of the step that it is busy.

    Hovering over an action tells its name and times. The same actions give the same bytes.
    """
    servers, length = _servers(timed), _length(timed)
    height = _TOP + _ROW * len(servers) + 56
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label={quoteattr(title or "Timeline of a step")} font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    scale = (_WIDTH - _LEFT - _RIGHT) / length if length else 0.0
    paler = _paler_stages(timed)
    for row, server in enumerate(servers):
        top = _TOP + row * _ROW
        middle = top + _BAR / 2 + 4
        busy = f"{_busy(timed, server) / length:.0%}" if length else ""
        lines += [
            f'<text x="{_LEFT - 8}" y="{middle:g}" text-anchor="end">server {server}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_BAR}" fill="#f0f0f0"/>',
            *(_svg_action(item, top, scale, paler) for item in timed if item.server == server),
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{middle:g}">{busy}</text>',
        ]
    bottom = _TOP + _ROW * len(servers) + 12
    right = _WIDTH - _RIGHT
    for x, seconds, anchor in (
        (_LEFT, 0.0, "start"),
        ((_LEFT + right) / 2, length / 2, "middle"),
        (right, length, "end"),
    ):
        lines.append(f'<text x="{x:g}" y="{bottom}" text-anchor="{anchor}" fill="#555555">{_seconds(seconds)}</text>')
    x = float(_LEFT)
    for look in _looks(timed):
        lines.append(f'<rect x="{x:g}" y="{bottom + 14}" width="14" height="14" fill="{look.fill}"/>')
        lines.append(f'<text x="{x + 20:g}" y="{bottom + 26}">{look.word}</text>')
        x += 44 + 7 * len(look.word)
    if paler:
        lines.append(f'<text x="{x:g}" y="{bottom + 26}" fill="#555555">{_PALER}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _svg_action(item: TimedAction, top: int, scale: float, paler: frozenset[int]) -> str:
    action, start, end = item.action, item.start, item.end
    x, width = _LEFT + start * scale, (end - start) * scale
    look = _LOOKS[action.kind]
    fill = look.paler if action.stage in paler else look.fill
    label = ""
    if action.kind in OF_MICRO_BATCH and width >= _LEAST_LABEL:
        label = (
            f'<text x="{x + width / 2:.2f}" y="{top + _BAR / 2 + 4:g}" text-anchor="middle" fill="{_ink(fill)}" '
            f'font-size="11">{action.micro_batch}</text>'
        )
    return (
        f"<g><title>{action}: {_seconds(start)} to {_seconds(end)}</title>"
        f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{_BAR}" fill="{fill}" stroke="#ffffff" '
        f'stroke-width="0.5"/>{label}</g>'
    )


def _label(action: Action, columns: int) -> str:
    """Return what stands in the columns of an action: kind and micro-batch, or the latter alone where that fits."""
    if action.kind not in OF_MICRO_BATCH:
        return action.kind.ljust(columns) if len(action.kind) < columns else " " * columns
    name, number = f"{action.kind}{action.micro_batch}", str(action.micro_batch)
    if len(name) < columns:
        return name.ljust(columns)
    return number.ljust(columns) if len(number) <= columns else " " * columns


def _axis(length: float, columns: int, indent: int) -> str:
    end = _seconds(length)
    return " " * indent + "0" + end.rjust(columns - 1)


def _seconds(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _servers(timed: Sequence[TimedAction]) -> list[int]:
    return sorted({item.server for item in timed})


def _length(timed: Sequence[TimedAction]) -> float:
    return max((item.end for item in timed), default=0.0)


def _busy(timed: Sequence[TimedAction], server: int) -> float:
    return sum(item.end - item.start for item in timed if item.server == server)


def _paler_stages(timed: Sequence[TimedAction]) -> frozenset[int]:
    """Return every second stage of each server."""
    stages: dict[int, set[int]] = {}
    for item in timed:
        if item.action.kind in OF_MICRO_BATCH:
            stages.setdefault(item.server, set()).add(item.action.stage)
    return frozenset(stage for of_server in stages.values() for stage in sorted(of_server)[1::2])


def _looks(timed: Sequence[TimedAction]) -> Iterator[_Look]:
    kinds = {item.action.kind for item in timed}
    yield from dict.fromkeys(look for kind, look in _LOOKS.items() if kind in kinds)


def _ink(fill: str) -> str:
    """Return black or white, whichever can be read on a fill: by its luminance."""
    red, green, blue = (int(fill[place : place + 2], 16) for place in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#ffffff"
