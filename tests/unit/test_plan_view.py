"""A plan on a terminal: what is in its tables, that it fits every width, and that it can be read without colours."""

from __future__ import annotations

import io

import pytest
from plan_samples import replicated_summary, sharded_summary, summary, timeline
from rich.console import Console

from gradwire.cli.plan_view import picture_titles, plan_lines, plan_view
from gradwire.run_plan import RunPlan

PLAN = RunPlan.from_proto(summary(), timeline())


def shown(width: int, *, colours: bool = False, plan: RunPlan = PLAN) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colours, color_system="truecolor" if colours else None
    )
    for part in plan_view(plan, "a model", console):
        console.print(part)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def words(lines: list[str], beginning: str) -> list[str]:
    return next(line for line in lines if line.strip().startswith(beginning)).split()


def test_tables_have_the_numbers() -> None:
    lines = shown(120)
    assert lines[:2] == [
        "a model: 2 servers, 2 micro-batches, schedule auto",
        "expected: 180 ms a step, bubble 30.0%, 0.0% above the lower bound of any order",
    ]
    stage = next(place for place, line in enumerate(lines) if line.startswith("Stages: "))
    assert "(ms)" in lines[stage]
    assert "(MiB)" in lines[stage]
    assert lines[stage + 1].split()[-7:] == ["parameters", "F", "B", "I", "W", "sends", "codec"]
    assert lines[stage + 3].split()[-7:] == ["1,234,567", "20.0", "40.0", "20.0", "20.0", "1.00", "bf16"]
    assert "blocks.2" in lines[stage + 4]
    assert words(lines, "1  stage-1") == [
        *("1", "stage-1", "cpu,", "2", "threads", "1", "70%"),
        *("4.00", "4.00", "8.00", "5.00", "21.0", "1,024"),
    ]
    assert words(lines, "0  stage-0")[-1] == "?"
    assert words(lines, "→") == ["→", "auto", "2", "180", "30.0%", "21.0", "2.00", "1", "yes"]
    assert words(lines, "1f1b+1") == ["1f1b+1", "2", "198", "10.0%", "40.0%", "30.0", "2.00", "no"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_it_fits_the_terminal(width: int) -> None:
    lines = shown(width)
    assert max(map(len, lines)) <= width
    # What matters is there, however narrow.
    assert words(lines, "→")[:3] == ["→", "auto", "2"]
    assert any("F0" in line and line.startswith("server 0 │") for line in lines)


def test_colours_are_for_terminals_that_have_them() -> None:
    assert not any("\x1b[" in line for line in shown(100))
    assert any("\x1b[38;2;255;255;255;48;2;11;47;160mF0" in line for line in shown(100, colours=True))


def test_no_color_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = shown(100, colours=True)
    assert not any("48;2" in line for line in lines)
    assert any(line.strip().startswith("F forward   B backward") for line in lines)


def test_sentences_say_why() -> None:
    assert list(plan_lines(PLAN)) == [
        "why: an order made for these costs takes 180 ms",
        "cuts: proven to make the busiest server as fast as it can be",
        "costs: nodes were profiled on the servers' kind of device",
        "servers 0→1: 1,000 Mbit/s there, 100 Mbit/s back, round trip 2.00 ms, measured",
        "boundary 0→1: bf16",
    ]
    assumed = summary()
    assumed.prediction.cost_source = "estimated"
    assumed.prediction.links[0].measured = False
    assumed.prediction.partition_gap = 0.031
    lines = list(plan_lines(RunPlan.from_proto(assumed)))
    assert lines[1] == "cuts: others make the busiest server at most 3.1% faster"
    assert lines[2] == "costs: nodes are estimated from their shapes and the devices' measured rates"
    assert lines[3].endswith("round trip 2.00 ms, assumed: not measured")

    assumed.prediction.ClearField("partition_gap")
    assert "cuts: as the plan says" in plan_lines(RunPlan.from_proto(assumed))


def test_pictures_have_a_title() -> None:
    assert picture_titles(PLAN, "a model") == (
        "a model: 2 servers, 2 micro-batches, schedule auto",
        "expected: 180 ms a step, bubble 30.0%",
    )


def test_replicas_have_their_own_servers_and_an_exchange() -> None:
    plan = RunPlan.from_proto(replicated_summary(), timeline())
    lines = shown(160, plan=plan)
    assert lines[0] == "a model: 2 replicas of 2 servers, 4 micro-batches, schedule auto"
    head = next(line for line in lines if line.split()[:1] == ["replica"])
    assert head.split()[:5] == ["replica", "reduce", "(ms)", "server", "name"]
    rows = [line.split()[:4] for line in lines if "stage-0" in line]
    assert rows == [["0", "5.00", "0", "stage-0"], ["1", "5.00", "0", "stage-0-of-1"]]
    assert any(line.startswith("replicas: 2, which take 75.0%, 25.0%") for line in plan_lines(plan))
    assert not any(line.startswith("replicas") for line in plan_lines(PLAN))


def test_servers_of_a_stage_are_told_apart_and_what_they_share_is_listed() -> None:
    plan = RunPlan.from_proto(sharded_summary(), timeline())
    lines = shown(160, plan=plan)
    assert lines[0] == "a model: 4 servers (2 stages of 2 servers each), 2 micro-batches, schedule auto"
    rows = [line.split()[:3] for line in lines if "stage-1" in line]
    assert rows == [["1", "0", "stage-1-a"], ["1", "1", "stage-1-b"]]
    assert words(lines, "blocks.*.mlp.2.weight") == ["blocks.*.mlp.2.weight", "row", "3"]
    assert any(line.startswith("tensor: 2 servers a stage share parameters") for line in plan_lines(plan))
    assert not any(line.startswith("tensor") for line in plan_lines(PLAN))
    for width in (60, 80):
        assert max(map(len, shown(width, plan=plan))) <= width
