from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gradwire.plan import _VIRTUAL_STAGES, Plan
from gradwire_coordinator.named_schedules import AUTO, SCHEDULES, check_schedule
from gradwire_protocol.errors import PlanError, SettingsError
from gradwire_protocol.v1 import run_pb2


def no_modules(path: str) -> int:
    raise PlanError(f"no module {path}")


def test_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(Plan()) == {
        "stages": 1,
        "replicas": 1,
        "tensor": 1,
        "tensor_plan": "auto",
        "microbatches": 8,
        "schedule": "auto",
        "exchange": "ring",
        "every": None,
        "parameter_servers": None,
        "staleness": None,
        "compression": "none",
        "activation_compression": "none",
        "zero": "auto",
        "recompute": False,
        "virtual_stages": 1,
        "window": 2,
        "transport": "auto",
        "cuts": None,
        "stall_seconds": 60.0,
        "step_seconds": None,
        "checksums": False,
    }


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().stages = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Plan(2)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stages", 0),
        ("stages", 2.0),
        ("stages", True),
        ("microbatches", -1),
        ("window", 0),
        ("window", 17),
        ("replicas", 0),
        ("tensor", 0),
        ("tensor", True),
        ("tensor_plan", {}),
        ("tensor_plan", {"*": "diagonal"}),
        ("recompute", 1),
        ("checksums", "crc32c"),
        ("cuts", "layers.1"),
        ("cuts", [True]),
        ("cuts", [0]),
        ("cuts", [1.5]),
        ("stall_seconds", 0.5),
        ("stall_seconds", None),
        ("stall_seconds", float("nan")),
        ("stall_seconds", float("inf")),
        ("step_seconds", 0),
        ("step_seconds", True),
        ("step_seconds", "10"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(field: str, value: Any) -> None:
    with pytest.raises(PlanError) as caught:
        Plan(**{"stages": 2, field: value})
    assert caught.value.expected
    assert caught.value.got or field == "cuts"


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("schedule", "zb-2p", "'zb-h1' or 'zb-v'"),
        ("compression", "fp8", '"int8"'),
        ("compression", 8, "'int8'"),
        ("activation_compression", "topk", "'int8' or 'auto'"),
        ("activation_compression", None, "'int8' or 'auto'"),
        ("transport", "mpi", "'gloo' or 'nccl'"),
        ("tensor_plan", "mixtral", "'gpt2' or 'llama'"),
    ],
)
def test_what_is_not_carried_out_yet_says_what_is(field: str, value: Any, supported: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan(**{field: value})
    assert field in caught.value.message
    assert supported in caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("transport", ["gloo", "nccl"])
def test_parameter_servers_take_messages(transport: str) -> None:
    with pytest.raises(PlanError, match="goes as messages") as caught:
        Plan(replicas=2, exchange="parameter-server", transport=transport)
    assert "leave transport out" in caught.value.remedy
    assert Plan(replicas=2, exchange="parameter-server", transport="grpc").transport == "grpc"
    assert Plan(replicas=2, transport=transport).transport == transport


def test_replicas_share_the_micro_batches() -> None:
    made = Plan(stages=2, replicas=3, microbatches=3, compression=" topk( density = 0.05 )")
    assert made.compression == "topk(density=0.05)"
    message = made.to_proto(rows=6, cut_before=lambda name: 0)
    assert (message.replicas, message.exchange, message.compression) == (3, "ring", "topk(density=0.05)")
    with pytest.raises(PlanError, match="fewer micro-batches than replicas"):
        Plan(replicas=3, microbatches=2)


def test_servers_of_a_stage_have_a_plan_of_their_own() -> None:
    given = {"*.qkv.weight": "column"}
    made = Plan(stages=2, tensor=2, tensor_plan=given, transport="gloo")
    given["*"] = "whole"
    assert made.tensor_plan == {"*.qkv.weight": "column"}
    assert dataclasses.replace(made, tensor=4) == dataclasses.replace(dataclasses.replace(made), tensor=4)
    assert hash(made) == hash(dataclasses.replace(made))
    rules = [run_pb2.TensorRule(pattern="*.qkv.weight", split="column")]
    message = made.to_proto(rows=8, cut_before=no_modules, rules=rules)
    assert (message.tensor, list(message.tensor_plan), message.transport) == (2, rules, "gloo")
    assert Plan(tensor=2, replicas=2, exchange="local").tensor == 2
    with pytest.raises(PlanError, match="Parameter servers hold whole parameters") as caught:
        Plan(tensor=2, exchange="parameter-server")
    assert caught.value.remedy


def test_local_steps_may_be_told_by_their_number() -> None:
    assert Plan(exchange=" local( momentum = 0.5 )").exchange == "local(every=50, learning_rate=0.7, momentum=0.5)"
    made = Plan(replicas=2, exchange="local", every=8, zero="off")
    assert made.exchange == "local(every=8, learning_rate=0.7, momentum=0.9)"
    message = made.to_proto(rows=8, cut_before=no_modules)
    assert (message.exchange, message.zero) == (made.exchange, "off")
    # What a plan has become is a plan again, also with another number.
    assert dataclasses.replace(made) == made
    assert dataclasses.replace(made, every=3).exchange == "local(every=3, learning_rate=0.7, momentum=0.9)"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"exchange": "gossip"}, "exchange"),
        ({"exchange": 1}, "exchange is not valid"),
        ({"exchange": "local(every=0)"}, "settings"),
        ({"exchange": "local", "every": 0}, "every is not valid"),
        ({"exchange": "local", "every": True}, "every is not valid"),
        ({"exchange": "ring", "every": 8}, "every is of no use to this exchange"),
        ({"zero": "none"}, "zero='none' cannot be carried out"),
        ({"zero": True}, "zero=True cannot be carried out"),
    ],
)
def test_how_replicas_agree_is_checked(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem) as caught:
        Plan(replicas=2, **fields)
    assert caught.value.expected
    assert caught.value.got


def test_the_number_of_cuts_must_fit_the_stages() -> None:
    with pytest.raises(PlanError, match="2 cuts for 3 stages"):
        Plan(stages=3, cuts=[4])


@pytest.mark.parametrize(
    ("schedule", "asked", "virtual_stages"),
    [
        ("auto", 1, 1),
        ("auto", 4, 4),
        ("1f1b", 1, 1),
        ("zb-h1", 1, 1),
        # They need several, so that one means: as few as they can have.
        ("interleaved-1f1b", 1, 2),
        ("interleaved-1f1b", 3, 3),
        ("zb-v", 1, 2),
        ("zb-v", 2, 2),
    ],
)
def test_how_many_stages_a_server_has(schedule: str, asked: int, virtual_stages: int) -> None:
    plan = Plan(stages=3, schedule=schedule, virtual_stages=asked)
    assert plan.virtual_stages == virtual_stages
    assert plan.to_proto(rows=1, cut_before=no_modules).virtual_stages == virtual_stages
    assert dataclasses.replace(plan, stages=2).virtual_stages == virtual_stages


@pytest.mark.parametrize(
    ("schedule", "virtual_stages", "expected"),
    [("gpipe", 2, "1"), ("1f1b", 2, "1"), ("zb-h1", 3, "1"), ("zb-v", 3, "2"), ("auto", 17, "1 to 16")],
)
def test_a_schedule_is_not_made_for_any_number_of_stages_a_server(
    schedule: str, virtual_stages: int, expected: str
) -> None:
    with pytest.raises(PlanError, match=f"{schedule} is not made for {virtual_stages} virtual stages") as caught:
        Plan(schedule=schedule, virtual_stages=virtual_stages)
    assert caught.value.expected == expected
    assert caught.value.remedy


def test_the_coordinator_allows_what_the_client_allows() -> None:
    for schedule, (least, most) in _VIRTUAL_STAGES.items():
        for virtual_stages in range(18):
            if least <= virtual_stages <= most:
                check_schedule(schedule, virtual_stages)
            else:
                with pytest.raises(PlanError):
                    check_schedule(schedule, virtual_stages)
    assert set(_VIRTUAL_STAGES) == {AUTO, *SCHEDULES}


def test_cuts_and_codecs_count_all_stages() -> None:
    plan = Plan(stages=2, schedule="zb-v", cuts=[1, 2, 3], activation_compression=["int8", "none", "bf16"])
    message = plan.to_proto(rows=1, cut_before=no_modules)
    assert (list(message.cuts), list(message.activation_compression)) == ([1, 2, 3], ["int8", "none", "bf16"])
    with pytest.raises(PlanError, match="5 cuts for 6 stages"):
        Plan(stages=2, virtual_stages=3, schedule="interleaved-1f1b", cuts=[1])
    with pytest.raises(PlanError, match="3 for the boundaries of 4 stages"):
        Plan(stages=2, schedule="zb-v", activation_compression=["int8"])


def test_codecs_of_activations_are_one_for_all_boundaries_or_one_for_each() -> None:
    def sent(codecs: Any, stages: int = 3) -> list[str]:
        plan = Plan(stages=stages, activation_compression=codecs)
        return list(plan.to_proto(rows=1, cut_before=no_modules).activation_compression)

    assert sent("auto") == ["auto"]
    assert sent(["int8", "none"]) == ["int8", "none"]
    assert sent([], stages=1) == []
    with pytest.raises(PlanError, match="2 for the boundaries of 3 stages"):
        Plan(stages=3, activation_compression=["int8"])


def test_cuts_by_module_become_positions() -> None:
    plan = Plan(stages=3, cuts=["layers.1", 9], microbatches=4, window=3, schedule="gpipe")
    message = plan.to_proto(rows=12, cut_before={"layers.1": 5}.__getitem__)
    assert list(message.cuts) == [5, 9]
    assert (message.stages, message.micro_batches, message.window, message.schedule) == (3, 4, 3, "gpipe")
    assert message.expected_rows == 12


def test_cuts_that_do_not_rise_are_refused() -> None:
    with pytest.raises(PlanError, match="do not leave nodes for every stage"):
        Plan(stages=3, cuts=["layers.1", 5]).to_proto(rows=1, cut_before={"layers.1": 5}.__getitem__)


def test_without_cuts_the_coordinator_chooses() -> None:
    assert not Plan(stages=3).to_proto(rows=1, cut_before=no_modules).cuts


def test_checksums_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Plan(checksums=True).to_proto(rows=8, cut_before=no_modules).checksums
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not Plan().to_proto(rows=8, cut_before=no_modules).checksums
    with pytest.raises(SettingsError, match=r"cannot make checksums.*gradwire\[checksums\]"):
        Plan(checksums=True).to_proto(rows=8, cut_before=no_modules)


def test_parameter_servers_are_written_in_fields_or_in_the_text() -> None:
    fields = Plan(exchange="parameter-server", parameter_servers=2, staleness=3)
    assert fields.exchange == "parameter-server(servers=2, staleness=3)"
    assert fields.window == 4  # so far ahead a replica may be
    assert Plan(exchange=fields.exchange).exchange == fields.exchange
    assert Plan(exchange="parameter-server", window=5).window == 5
    for wrong in ({"staleness": 1}, {"exchange": "local", "parameter_servers": 1}, {"exchange": "ring", "every": 3}):
        with pytest.raises(PlanError, match="of no use to this exchange"):
            Plan(**wrong)
    with pytest.raises(PlanError, match="staleness is not valid"):
        Plan(exchange="parameter-server", staleness=-1)


def test_a_compression_may_be_left_open() -> None:
    assert Plan(replicas=2, compression="auto").compression == "auto"
