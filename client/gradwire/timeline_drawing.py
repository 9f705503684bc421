"""Draws who does what when in a step: coloured text for a terminal, and SVG.

Pure: timed actions go in. Leaves to others: where the times come from, a plan's prediction or a measured step,
`timeline_png.py` the same as pixels, and writing files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from rich.text import Text

from gradwire.units import shown_seconds
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
class Look:
    """How a kind of action looks: fill, and a paler one for every second stage of a server; what it is called."""

    fill: str
    paler: str
    word: str


# Also where a terminal has 16 colours only, each becomes another one of them.
_REST = Look("#7a7a7a", "#7a7a7a", "reduce, norm, update")
_LOOKS = {
    FORWARD: Look("#0b2fa0", "#6a86ff", "forward"),
    BACKWARD: Look("#1f9d3a", "#6fd585", "backward"),
    INPUT_GRADIENT: Look("#159f9f", "#66d9d9", "input gradient"),
    WEIGHT_GRADIENT: Look("#c9881b", "#f0cf6a", "weight gradient"),
    REDUCE: _REST,
    NORM: _REST,
    UPDATE: _REST,
}
PALER = "paler: every 2nd stage of a server"
_LEAST_COLUMNS = 10
# Relative, of seconds.
_TIE = 1e-9
# Ends an action, so that its neighbour of the same colour is seen to be another one.
_EDGE = "▕"
_IDLE = "·"
# Of what is done once a step, where colours do not say it.
_REST_LETTER = "U"
_BETWEEN = "   "

# Of pictures, in pixels.
WIDTH, ROW, BAR, LEFT, RIGHT, TOP, FOOT = 1080, 36, 28, 84, 64, 62, 64
# What an action must be wide for its micro-batch's number, by digits.
LEAST_LABEL = (0, 11, 17, 24)


@dataclass(frozen=True)
class Timeline:
    """What is to be drawn, and what follows from it."""

    timed: Sequence[TimedAction]

    @cached_property
    def servers(self) -> list[int]:
        return sorted({item.server for item in self.timed})

    @cached_property
    def seconds(self) -> float:
        return max((item.end for item in self.timed), default=0.0)

    @cached_property
    def paler_stages(self) -> frozenset[int]:
        """Every second stage of each server."""
        stages: dict[int, set[int]] = {}
        for item in self.timed:
            if item.action.kind in OF_MICRO_BATCH:
                stages.setdefault(item.server, set()).add(item.action.stage)
        return frozenset(stage for of_server in stages.values() for stage in sorted(of_server)[1::2])

    def row(self, server: int) -> list[TimedAction]:
        """Return the actions of a server, in order."""
        return sorted((item for item in self.timed if item.server == server), key=lambda item: item.start)

    def busy_share(self, server: int) -> str:
        """Return the share of the step that a server is busy, as text."""
        busy = sum(item.end - item.start for item in self.timed if item.server == server)
        return f"{busy / self.seconds:.0%}" if self.seconds else ""

    def fill(self, action: Action) -> str:
        """Return the colour of an action."""
        look = _LOOKS[action.kind]
        return look.paler if action.kind in OF_MICRO_BATCH and action.stage in self.paler_stages else look.fill

    def looks(self) -> Iterator[tuple[str, Look]]:
        """Yield what the legend explains: the letter and the look of each kind that occurs."""
        kinds = {item.action.kind for item in self.timed}
        seen = dict.fromkeys(look for kind, look in _LOOKS.items() if kind in kinds)
        for look in seen:
            letters = [kind for kind, other in _LOOKS.items() if other is look]
            yield letters[0] if len(letters) == 1 else _REST_LETTER, look

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Return round seconds from 0 on, with labels, so many at the most."""
        if not self.seconds:
            return [(0.0, "0")]
        step = 10.0 ** math.floor(math.log10(self.seconds / max(1, most)))
        step = next(step * factor for factor in (1, 2, 5, 10) if self.seconds <= most * step * factor * (1 + _TIE))
        ticks = [number * step for number in range(1 + math.floor(self.seconds / step * (1 + _TIE)))]
        factor, unit = next(
            (factor, unit)
            for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
            if self.seconds >= factor or unit == "µs"
        )
        return [(tick, f"{tick / factor:.6g} {unit}" if tick else "0") for tick in ticks]


def text_timeline(timed: Sequence[TimedAction], width: int, *, colours: bool = True) -> Text:
    """Return a line a server of `width` columns at most, an axis and a legend.

    An action begins and ends in the nearest column, and has its micro-batch's number where there is room; `·` is a
    bubble. Colours say the kind, and are paler on every second stage of a server; without colours letters say it. The
    percentage is the share of the step that a server is busy.
    """
    line = Timeline(timed)
    names = [f"server {server}" for server in line.servers]
    shares = [line.busy_share(server).rjust(5) for server in line.servers]
    indent = max(map(len, names), default=0) + 1
    columns = max(_LEAST_COLUMNS, width - indent - max(map(len, shares), default=0) - 2)
    text = Text(no_wrap=True)
    for server, name, share in zip(line.servers, names, shares, strict=True):
        text.append(f"{name.ljust(indent - 1)} │")
        at = 0
        for item in line.row(server):
            first, behind = (
                round(seconds / line.seconds * columns) if line.seconds else 0 for seconds in (item.start, item.end)
            )
            first = max(at, first)
            if behind <= first:
                continue  # too short to be seen
            text.append(_IDLE * (first - at), "dim")
            fill = line.fill(item.action)
            label = _label(item.action, behind - first, colours=colours)
            text.append(label, f"{ink(fill)} on {fill}" if colours else "")
            at = behind
        text.append(_IDLE * (columns - at), "dim")
        text.append(f"│{share}\n")
    text.append(_axis(line, columns, indent))
    at = width
    for part in _legend(line, colours=colours):
        if at + len(_BETWEEN) + len(part) > width:
            text.append("\n" + " " * (indent + 1))
            at = indent + 1
        else:
            text.append(_BETWEEN)
            at += len(_BETWEEN)
        text.append(part)
        at += len(part)
    return text


def svg_timeline(timed: Sequence[TimedAction], title: str = "", subtitle: str = "") -> str:
    """Return the picture as an SVG document: a row a server, with the share of the step that it is busy.

    Hovering over an action tells its name and times. The same actions give the same bytes.
    """
    line = Timeline(timed)
    bottom = TOP + ROW * len(line.servers)
    height = bottom + FOOT
    right = WIDTH - RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label={quoteattr(title or "Timeline of a step")} font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT}" y="45" fill="#555555">{escape(subtitle)}</text>',
    ]
    scale = (right - LEFT) / line.seconds if line.seconds else 0.0
    for server, top in zip(line.servers, range(TOP, bottom, ROW), strict=True):
        middle = top + BAR / 2 + 4.5
        lines += [
            f'<text x="{LEFT - 10}" y="{middle:g}" text-anchor="end">server {server}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{right - LEFT}" height="{BAR}" fill="#eef0f3"/>',
            f'<text x="{right + 10}" y="{middle:g}">{line.busy_share(server)}</text>',
        ]
    for tick, label in line.ticks(8):
        x = LEFT + tick * scale
        lines.append(
            f'<path d="M{x:.2f} {TOP - 4}V{bottom}" stroke="#c3c8cf" stroke-width="0.7"/>'
            f'<text x="{x:.2f}" y="{bottom + 15}" text-anchor="middle" fill="#555555">{label}</text>'
        )
    for server, top in zip(line.servers, range(TOP, bottom, ROW), strict=True):
        lines += [_svg_action(line, item, top, scale) for item in line.row(server)]
    x = float(LEFT)
    for _, look in line.looks():
        lines.append(f'<rect x="{x:g}" y="{bottom + 32}" width="14" height="14" rx="2" fill="{look.fill}"/>')
        lines.append(f'<text x="{x + 20:g}" y="{bottom + 44}">{look.word}</text>')
        x += 46 + 7 * len(look.word)
    if line.paler_stages:
        lines.append(f'<text x="{x:g}" y="{bottom + 44}" fill="#555555">{PALER}</text>')
    return "\n".join([*lines, "</svg>", ""])


def picture_label(action: Action, pixels: float) -> str:
    """Return the number of the micro-batch, if an action is so wide in a picture that it has room."""
    number = str(action.micro_batch) if action.kind in OF_MICRO_BATCH else ""
    return number if pixels >= LEAST_LABEL[min(len(number), len(LEAST_LABEL) - 1)] else ""


def ink(fill: str) -> str:
    """Return black or white, whichever can be read on a fill: by its luminance."""
    red, green, blue = (int(fill[place : place + 2], 16) for place in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "#ffffff"


def _svg_action(line: Timeline, item: TimedAction, top: int, scale: float) -> str:
    action, start, end = item.action, item.start, item.end
    x, width = LEFT + start * scale, (end - start) * scale
    fill = line.fill(action)
    label = picture_label(action, width)
    if label:
        label = (
            f'<text x="{x + width / 2:.2f}" y="{top + BAR / 2 + 4.5:g}" text-anchor="middle" fill="{ink(fill)}" '
            f'font-size="12">{label}</text>'
        )
    return (
        f"<g><title>{action}: {shown_seconds(start)} to {shown_seconds(end)}</title>"
        f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{BAR}" fill="{fill}" stroke="#ffffff" '
        f'stroke-width="0.8"/>{label}</g>'
    )


def _label(action: Action, columns: int, *, colours: bool) -> str:
    """Return what stands in the columns of an action: kind and micro-batch, or what of it fits, and its edge."""
    room = columns - 1
    if action.kind in OF_MICRO_BATCH:
        letter, long, short = action.kind, f"{action.kind}{action.micro_batch}", str(action.micro_batch)
    else:
        letter, long, short = _REST_LETTER, action.kind.lower(), ""
    if not colours:
        short = letter
    if columns == 1:  # a letter says more than an edge
        return short if len(short) == 1 else letter if not colours else " "
    return next((name for name in (long, short) if len(name) <= room), "").ljust(room) + _EDGE


def _legend(line: Timeline, *, colours: bool) -> Iterator[Text]:
    for letter, look in line.looks():
        if not colours:
            yield Text(f"{letter} {look.word}")
        else:
            yield Text.assemble(("  ", f"on {look.fill}"), f" {look.word}")
    yield Text(f"{_IDLE} idle")
    if line.paler_stages and colours:
        yield Text(PALER)


def _axis(line: Timeline, columns: int, indent: int) -> str:
    axis = [" "] * (columns + 1)
    for tick, label in line.ticks(max(2, columns // 12)):
        place = round(tick / line.seconds * columns) if line.seconds else 0
        if place + len(label) <= len(axis):
            axis[place : place + len(label)] = label
    return " " * (indent + 1) + "".join(axis).rstrip()
