"""What a plan may say of tensor-parallel servers, and what does not go together with them."""

from __future__ import annotations

import pytest
from graph_text import plan
from sharded_samples import blocks_model, blocks_request, sharded

from gradwire_coordinator.model_checks import MAXIMUM_STAGES, check_model, check_plan
from gradwire_coordinator.tensor_checks import MAXIMUM_PATTERN_BYTES, MAXIMUM_RULES, check_whole_parameters
from gradwire_protocol.errors import LimitExceeded, ModelError, PlanError
from gradwire_protocol.group_operators import COPY
from gradwire_protocol.v1 import run_pb2

RULE = run_pb2.TensorRule(pattern="*.up.weight", split="column")


def test_plans_with_shards_and_rules_pass() -> None:
    check_plan(plan(2, tensor=4, tensor_plan=[RULE], transport="auto"))
    # A user may keep rules in settings, whatever the grid.
    check_plan(plan(2, tensor_plan=[RULE] * MAXIMUM_RULES, transport="nccl"))


@pytest.mark.parametrize("tensor", [0, MAXIMUM_STAGES + 1])
def test_shards_have_a_range(tensor: int) -> None:
    with pytest.raises(PlanError, match="tensor is out of range"):
        check_plan(plan(1, tensor=tensor))


def test_the_grid_has_a_size() -> None:
    check_plan(plan(MAXIMUM_STAGES // 4, tensor=2, replicas=2))
    with pytest.raises(PlanError, match="too many servers") as caught:
        check_plan(plan(MAXIMUM_STAGES // 4, tensor=3, replicas=2))
    assert (
        caught.value.got == f"{MAXIMUM_STAGES * 3 // 2}: 2 replicas of {MAXIMUM_STAGES // 4} stages, each of 3 servers"
    )


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        (run_pb2.TensorRule(pattern="", split="row"), "empty or too long"),
        (run_pb2.TensorRule(pattern="é" * (MAXIMUM_PATTERN_BYTES // 2) + "x", split="row"), "empty or too long"),
        (run_pb2.TensorRule(pattern="x", split="diagonal"), "in a way"),
        (run_pb2.TensorRule(pattern="x"), "in a way"),
    ],
)
def test_rules_are_checked(rule: run_pb2.TensorRule, part: str) -> None:
    with pytest.raises(PlanError, match=part):
        check_plan(plan(1, tensor_plan=[RULE, rule]))


def test_there_are_not_too_many_rules() -> None:
    with pytest.raises(LimitExceeded, match="too many rules"):
        check_plan(plan(1, tensor_plan=[RULE] * (MAXIMUM_RULES + 1)))


def test_a_transport_is_known() -> None:
    with pytest.raises(PlanError, match="transport") as caught:
        check_plan(plan(1, tensor=2, transport="pigeons"))
    assert caught.value.expected == "auto or grpc or gloo or nccl"


def test_parameter_servers_have_whole_parameters() -> None:
    served = {"replicas": 2, "exchange": "parameter-server(servers=1)"}
    check_plan(plan(1, **served))
    with pytest.raises(PlanError, match="Parameter servers cannot work") as caught:
        check_plan(plan(1, tensor=2, **served))
    assert 'exchange="ring"' in caught.value.remedy


def test_optimizers_that_look_at_whole_parameters_do_not_train_parts() -> None:
    asked = blocks_request(1, optimizer="Muon")
    with pytest.raises(PlanError, match=r"Muon looks at whole parameters, but .* would share up0"):
        check_whole_parameters(asked.optimizer, sharded(asked).indexed.tensors)
    only_whole = run_pb2.Optimizer(name="Muon", groups=[run_pb2.OptimizerGroup(parameters=["scale0"])])
    check_whole_parameters(only_whole, sharded(asked).indexed.tensors)
    check_whole_parameters(blocks_request(1).optimizer, sharded(asked).indexed.tensors)
    for spec in asked.model.tensors:
        spec.requires_grad = False
    check_whole_parameters(asked.optimizer, sharded(asked).indexed.tensors)


def test_clients_send_whole_tensors_and_no_group_operators() -> None:
    made = blocks_model(1)
    made.tensors[1].split.sections[:] = [32]
    with pytest.raises(ModelError, match="up0 is split already"):
        check_model(made)
    made = blocks_model(1)
    made.evaluate.nodes[0].target = COPY
    with pytest.raises(ModelError, match="only the coordinator puts into graphs"):
        check_model(made)
