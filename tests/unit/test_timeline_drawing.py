"""Pictures of a step: as text, whose colours say the kind, and as SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from gradwire.timeline_drawing import TimedAction, Timeline, svg_timeline, text_timeline
from gradwire_protocol.program import Action, parse_action

SVG = "{http://www.w3.org/2000/svg}"


def timed(*rows: str) -> list[TimedAction]:
    """Parse "0F0@0-1": one row a server, seconds after the action."""
    found = []
    for server, row in enumerate(rows):
        for word in row.split():
            action, _, seconds = word.partition("@")
            start, _, end = seconds.partition("-")
            found.append(TimedAction(server, parse_action(action), float(start), float(end)))
    return found


STEP = timed(
    "0F0@0-1 0F1@1-2 0B0@4-6 0B1@7-9 UPDATE@9-10",
    "1F0@1-2 1I0@2-3 1F1@3-4 1W0@4-5 1I1@5-6 1W1@6-7",
)


def fills(text) -> list[tuple[str, str]]:
    """Return the coloured pieces: what stands there, and on what."""
    return [
        (text.plain[span.start : span.end], str(span.style).rpartition("on ")[2])
        for span in text.spans
        if " on " in str(span.style)
    ]


def test_text() -> None:
    assert text_timeline(STEP, 56).plain.splitlines() == [
        "server 0 │F0 ▕F1 ▕········B0     ▕····B1     ▕   ▕│  70%",
        "server 1 │····F0 ▕I0 ▕F1 ▕W0 ▕I1 ▕W1 ▕············│  60%",
        "          0                   5 s",
        "             forward      backward      input gradient",
        "             weight gradient      reduce, norm, update",
        "          · idle",
    ]
    assert "update ▕│  70%" in text_timeline(STEP, 96).plain.splitlines()[0]


def test_without_colours_letters_say_the_kind() -> None:
    drawn = text_timeline(STEP, 42, colours=False)
    assert not fills(drawn)
    assert drawn.plain.splitlines() == [
        "server 0 │F0▕F▕·····B0   ▕··B1  ▕U ▕│  70%",
        "server 1 │···F▕I0▕F▕W0▕I1▕W▕········│  60%",
        "          0            5 s",
        "          F forward   B backward",
        "          I input gradient",
        "          W weight gradient",
        "          U reduce, norm, update   · idle",
    ]


def test_colours_say_the_kind_and_the_stage() -> None:
    pieces = dict(fills(text_timeline(STEP, 56)))
    by_kind = {label.strip()[0]: fill for label, fill in pieces.items() if label[:1] in {*"FBIW"}}
    assert len({by_kind[kind] for kind in "FBIW"}) == 4
    there_and_back = timed("0F0@0-1 3F0@3-4 3B0@4-5 0B0@7-8", "1F0@1-2 2F0@2-3 2B0@5-6 1B0@6-7")
    drawn = text_timeline(there_and_back, 70)
    first, second = [fill for label, fill in fills(drawn) if label.startswith("F")][:2]
    assert first != second
    assert drawn.plain.endswith("paler: every 2nd stage of a server")


def test_what_has_no_room_is_left_out_and_lines_stay_as_long() -> None:
    many = timed(" ".join(f"0F{i}@{i}-{i + 1}" for i in range(500)), "1F0@0-500")
    for width in (1, 40, 90):
        for colours in (True, False):
            lines = text_timeline(many, width, colours=colours).plain.splitlines()
            assert len(lines[0]) == len(lines[1])
            assert len(lines[0]) <= max(width, 26)
    assert text_timeline([], 40).plain.startswith(" ")


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (10.0, ["0", "2 s", "4 s", "6 s", "8 s", "10 s"]),
        (0.638, ["0", "200 ms", "400 ms", "600 ms"]),
        (0.000045, ["0", "10 µs", "20 µs", "30 µs", "40 µs"]),
        (0.0, ["0"]),
    ],
)
def test_ticks_are_round(seconds: float, labels: list[str]) -> None:
    line = Timeline([TimedAction(0, Action(0, "F", 0), 0.0, seconds)])
    assert [label for _, label in line.ticks(6)] == labels


def test_svg() -> None:
    document = svg_timeline(STEP, 'auto: 2 stages & "more" <b>', "10 s")
    root = ElementTree.fromstring(document)
    assert root.get("aria-label") == 'auto: 2 stages & "more" <b>'
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert len(titles) == len(STEP)
    assert titles[0] == "0F0: 0 to 1.00 s"
    assert titles[4] == "UPDATE: 9.00 s to 10.0 s"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"server 0", "server 1", "70%", "60%", "0", "2 s", "10 s", "forward", "weight gradient"} <= set(texts)
    # An action's place and width are its times, on the axis from 84 to 1016.
    rectangle = root.findall(f"{SVG}g")[2].find(f"{SVG}rect")
    assert rectangle is not None
    assert (rectangle.get("x"), rectangle.get("width")) == ("456.80", "186.40")
    assert document == svg_timeline(STEP, 'auto: 2 stages & "more" <b>', "10 s")
    assert ElementTree.fromstring(svg_timeline([])).tag == f"{SVG}svg"
