"""A plan's boundaries: what crosses them in a cut graph, and how they are shown."""

from __future__ import annotations

from graph_text import graph, model, tensor

from gradwire.boundaries import boundary_lines
from gradwire.run_plan import RunPlan
from gradwire_coordinator.boundaries import Boundaries, asked_codecs, needs_links
from gradwire_coordinator.codec_choice import Choice
from gradwire_coordinator.costs import Rates
from gradwire_coordinator.graph_index import learned_values
from gradwire_coordinator.link_rates import LinkRate
from gradwire_coordinator.model_checks import IndexedModel, check_model
from gradwire_coordinator.segments import make_segments
from gradwire_coordinator.simulator import StageSeconds
from gradwire_protocol.program import parse_program
from gradwire_protocol.v1 import coordinator_pb2, graph_pb2, run_pb2
from gradwire_protocol.v1 import tensors_pb2 as pb

RATES = Rates(flops_per_second=1e9, bytes_per_second=1e9)


def indexed() -> IndexedModel:
    """A mask made of the input alone, and an activation that a parameter made; both are read behind both cuts."""
    text = "input x\ntensor p = weight\nmask = f(x)\na = f(x, p)\nb = f(a, mask)\nloss = f(b, a, mask)\noutput loss"
    return check_model(model([tensor("weight")], graph("train", text)))


def test_what_no_parameter_had_a_part_in_is_exact() -> None:
    made = indexed()
    assert learned_values(made.train, {"weight"}) == {"p", "a", "b", "loss"}
    assert learned_values(made.train, set()) == frozenset()
    segments = make_segments(made, [2, 3], rows=2, rates=RATES).of_graph(graph_pb2.GRAPH_KIND_TRAIN)
    assert {(value.value, value.exact) for value in segments[0].outgoing} == {("mask", True), ("a", False)}
    assert {(value.value, value.exact) for value in segments[1].outgoing} == {("b", False)}


def test_bytes_that_leave_a_stage_are_those_of_each_readers_codec() -> None:
    made = indexed()
    segments = make_segments(made, [2, 3], rows=16, rates=RATES).of_graph(graph_pb2.GRAPH_KIND_TRAIN)
    boundaries = Boundaries(made.train, segments, (0, 1, 2), rows=16)
    elements = 16 * 4
    plain, halved = 4 * elements, 2 * elements
    # To stage 1 and stage 2: the mask as it is, the activation under the codec in front of each.
    assert boundaries.leaving_bytes(segments[0], [Choice("none"), Choice("none")]) == 4 * plain
    assert boundaries.leaving_bytes(segments[0], [Choice("none"), Choice("bf16")]) == 3 * plain + halved
    assert boundaries.leaving_bytes(segments[0], [Choice("int8"), Choice("bf16")]) == 2 * plain + halved + elements + 4
    assert boundaries.leaving_bytes(segments[1], [Choice("none"), Choice("bf16")]) == halved


def test_between_stages_of_one_server_nothing_travels_and_a_value_comes_to_a_server_once() -> None:
    made = indexed()
    segments = make_segments(made, [2, 3], rows=16, rates=RATES).of_graph(graph_pb2.GRAPH_KIND_TRAIN)
    plain = 4 * 16 * 4
    choices = [Choice("none"), Choice("none")]
    # Mask and activation are read by both other stages.
    assert Boundaries(made.train, segments, (0, 1, 0), rows=16).leaving_bytes(segments[0], choices) == 2 * plain
    assert Boundaries(made.train, segments, (0, 1, 1), rows=16).leaving_bytes(segments[0], choices) == 2 * plain
    assert Boundaries(made.train, segments, (0, 1, 1), rows=16).leaving_bytes(segments[1], choices) == 0
    assert Boundaries(made.train, segments, (0, 0, 1), rows=16).leaving_bytes(segments[0], choices) == 2 * plain
    assert Boundaries(made.train, segments, (0, 0, 0), rows=16).leaving_bytes(segments[0], choices) == 0


def test_a_boundary_within_a_server_has_no_codec() -> None:
    made = indexed()
    segments = make_segments(made, [2, 3], rows=16, rates=RATES).of_graph(graph_pb2.GRAPH_KIND_TRAIN)
    boundaries = Boundaries(made.train, segments, (0, 1, 1), rows=16)
    programs = [parse_program("0F0 0B0"), parse_program("1F0 2F0 2B0 1B0")]
    seconds = [StageSeconds(1e-6, 2e-6)] * 3
    slow = LinkRate(forward=1e3, backward=1e3, round_trip_seconds=0.01)
    for asked, links in ((["int8", "int8"], {}), (["auto", "auto"], {(0, 1): slow})):
        found = boundaries.choose(asked, programs, seconds, [RATES, RATES], links)
        assert [choice.codec for choice in found] == ["int8", "none"]
        assert not found[1].reason
    # A link is one both ways.
    back = LinkRate(forward=1e3, backward=1e9, round_trip_seconds=0.01)
    _, between = boundaries.loaded([Choice("none")] * 2, seconds, [RATES, RATES], {(1, 0): back})
    assert between[0].backward > between[0].forward
    assert between[1].forward == between[1].backward == 0.0


def test_a_plan_names_one_codec_for_all_boundaries_or_one_for_each() -> None:
    def asked(*codecs: str, stages: int = 3) -> list[str]:
        return asked_codecs(run_pb2.Plan(stages=stages, virtual_stages=1, activation_compression=codecs))

    assert asked() == ["none", "none"]
    assert asked("int8") == ["int8", "int8"]
    assert asked("int8", "auto") == ["int8", "auto"]
    assert asked("int8", stages=1) == []
    assert asked_codecs(run_pb2.Plan(stages=2, virtual_stages=2, activation_compression=["bf16"])) == ["bf16"] * 3
    assert needs_links(run_pb2.Plan(stages=3, virtual_stages=1, activation_compression=["int8", "auto"]))
    assert not needs_links(run_pb2.Plan(stages=1, virtual_stages=1, activation_compression=["auto"]))


def test_lines_tell_codecs_and_why() -> None:
    plan = coordinator_pb2.PlanSummary(
        stages=[
            coordinator_pb2.StageSummary(stage=0, codec=pb.CODEC_INT8, codec_reason="link 9.6 Mbit/s"),
            coordinator_pb2.StageSummary(stage=1, codec=pb.CODEC_BF16),
            coordinator_pb2.StageSummary(stage=2, codec=pb.CODEC_NONE, codec_reason="link 900 Mbit/s"),
            coordinator_pb2.StageSummary(stage=3, codec=pb.CODEC_NONE),
            coordinator_pb2.StageSummary(stage=4),
        ]
    )
    assert list(boundary_lines(RunPlan.from_proto(plan))) == [
        "boundary 0→1: int8, link 9.6 Mbit/s",
        "boundary 1→2: bf16",
        "boundary 2→3: none, link 900 Mbit/s",
    ]
