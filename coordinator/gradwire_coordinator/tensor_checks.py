"""Checks of what a plan says of tensor-parallel servers, and of whether an optimizer can work on parts of parameters.

Leaves to others: what is split and how (`tensor/`), and the other fields of a plan (`model_checks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from gradwire_protocol.errors import LimitExceeded, PlanError
from gradwire_protocol.exchanges import parse_exchange
from gradwire_protocol.optimizer_state import NEED_WHOLE_PARAMETERS
from gradwire_protocol.transports import AUTO, TRANSPORTS
from gradwire_protocol.v1 import graph_pb2, run_pb2

MAXIMUM_RULES = 1000
MAXIMUM_PATTERN_BYTES = 512
SPLITS = ("column", "row", "vocab", "whole", "auto")


def stage_servers(plan: run_pb2.Plan) -> int:
    """Return how many servers the stages of a plan take: of all replicas and shards."""
    return plan.stages * plan.replicas * plan.tensor


def check_tensor(plan: run_pb2.Plan) -> None:
    """Check what a plan says of tensor-parallel servers; PlanError, LimitExceeded.

    Rules of a plan with one server a stage are checked too, and mean nothing.
    """
    _check_rules(plan)
    if plan.transport not in ("", AUTO, *TRANSPORTS):
        raise PlanError(
            "The plan's transport is not one that this version knows",
            expected=" or ".join((AUTO, *TRANSPORTS)),
            got=repr(plan.transport[:40]),
        )
    if plan.tensor > 1 and parse_exchange(plan.exchange or "ring").has_servers:
        raise PlanError(
            "Parameter servers cannot work with tensor-parallel servers: each has whole parameters",
            expected="1 server a stage, or replicas that agree without parameter servers",
            got=f"tensor={plan.tensor} with exchange={plan.exchange[:80]!r}",
            remedy='use exchange="ring", or tensor=1',
        )


def _check_rules(plan: run_pb2.Plan) -> None:
    if len(plan.tensor_plan) > MAXIMUM_RULES:
        raise LimitExceeded(
            "The plan has too many rules of how parameters are split",
            expected=f"at most {MAXIMUM_RULES}",
            got=str(len(plan.tensor_plan)),
            remedy='write patterns that several parameters match, such as "*.mlp.up.weight"',
        )
    for rule in plan.tensor_plan:
        size = len(rule.pattern.encode())
        if not 1 <= size <= MAXIMUM_PATTERN_BYTES:
            raise PlanError(
                "A pattern of the plan's tensor_plan is empty or too long",
                expected=f"1 to {MAXIMUM_PATTERN_BYTES} bytes",
                got=f"{size} bytes: {rule.pattern[:40]!r}",
            )
        if rule.split not in SPLITS:
            raise PlanError(
                f"The plan's tensor_plan splits {rule.pattern[:80]!r} in a way that this version does not know",
                expected=" or ".join(SPLITS),
                got=repr(rule.split[:40]),
            )


def check_whole_parameters(optimizer: run_pb2.Optimizer, tensors: Mapping[str, graph_pb2.TensorSpec]) -> None:
    """PlanError if an optimizer that looks at whole parameters trains one that is split, of `tensors` rewritten."""
    if optimizer.name not in NEED_WHOLE_PARAMETERS:
        return
    for group in optimizer.groups:
        for name in group.parameters:
            if tensors[name].HasField("split") and tensors[name].requires_grad:
                raise PlanError(
                    f"{optimizer.name} looks at whole parameters, but tensor-parallel servers would share {name}",
                    expected="an optimizer that treats each element for itself, or parameters that are not split",
                    got=f"{name}, split along dimension {tensors[name].split.dimension}",
                    remedy='use another optimizer, tensor=1, or a rule that leaves its parameters "whole"',
                )
