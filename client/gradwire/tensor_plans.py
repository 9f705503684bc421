"""How tensor-parallel servers split a model's parameters: plans that are ready, and a user's own, as rules by name.

A rule is a pattern of a parameter's names (fnmatch) and a split. It names weights; what goes with one, such as its
bias, follows. "column": by the product's outputs, "row": by its inputs (Megatron-LM, Shoeybi et al. 2019), "vocab": an
embedding, and a head that reads the same table, by rows; "whole": each server has all of it.

| plan | for | column | row | vocab |
|---|---|---|---|---|
| gpt | Gradwire's GPT | attention.qkv, mlp.0 | attention.projection, mlp.2 | embedding, head |
| gpt2 | Hugging Face GPT-2 | attn.c_attn, mlp.c_fc | attn.c_proj, mlp.c_proj | wte, lm_head |
| llama | Hugging Face Llama and relatives | (q, k, v, gate, up)_proj | (o, down)_proj | embed_tokens, lm_head |

A ready plan leaves a vocabulary whole that the servers cannot share equally. Leaves to others: whether the model can be
split so, and where servers exchange something (the coordinator).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from gradwire_protocol.errors import PlanError
from gradwire_protocol.optimizer_state import NEED_WHOLE_PARAMETERS
from gradwire_protocol.v1 import graph_pb2, run_pb2

AUTO, COLUMN, ROW, VOCAB, WHOLE = "auto", "column", "row", "vocab", "whole"
SPLITS = (COLUMN, ROW, VOCAB, WHOLE)
MAXIMUM_PATTERN_BYTES = 512

# A pattern, and how the parameters are split that it matches.
Rule = tuple[str, str]

READY_PLANS: Mapping[str, tuple[Rule, ...]] = {
    "gpt": (
        ("*.attention.qkv.weight", COLUMN),
        ("*.attention.projection.weight", ROW),
        ("*.mlp.0.weight", COLUMN),
        ("*.mlp.2.weight", ROW),
        ("*embedding.weight", VOCAB),
        ("*head.weight", VOCAB),
    ),
    "gpt2": (
        ("*.attn.c_attn.weight", COLUMN),
        ("*.attn.c_proj.weight", ROW),
        ("*.mlp.c_fc.weight", COLUMN),
        ("*.mlp.c_proj.weight", ROW),
        ("*wte.weight", VOCAB),
        ("*lm_head.weight", VOCAB),
    ),
    "llama": (
        ("*.self_attn.q_proj.weight", COLUMN),
        ("*.self_attn.k_proj.weight", COLUMN),
        ("*.self_attn.v_proj.weight", COLUMN),
        ("*.self_attn.o_proj.weight", ROW),
        ("*.mlp.gate_proj.weight", COLUMN),
        ("*.mlp.up_proj.weight", COLUMN),
        ("*.mlp.down_proj.weight", ROW),
        ("*embed_tokens.weight", VOCAB),
        ("*lm_head.weight", VOCAB),
    ),
}
_SHOWN = 8


def checked_tensor_plan(given: Any) -> str | dict[str, str]:
    """Return a plan's name, or a copy of its rules, in their order. PlanError for what is neither."""
    names = (AUTO, *READY_PLANS)
    if isinstance(given, str):
        if given not in names:
            raise PlanError(
                f"tensor_plan={given!r} is no plan that is ready",
                expected=f"{' or '.join(map(repr, names))}, or a dict of name patterns and splits",
                got=repr(given),
                remedy='leave tensor_plan out, or write rules, as in {"*.qkv.weight": "column"}',
            )
        return given
    if not isinstance(given, Mapping) or not given:
        raise PlanError(
            "tensor_plan is not valid",
            expected=f"{' or '.join(map(repr, names))}, or a dict of name patterns and splits",
            got=repr(given),
        )
    for pattern, split in given.items():
        if not isinstance(pattern, str) or not 0 < len(pattern.encode()) <= MAXIMUM_PATTERN_BYTES:
            raise PlanError(
                "A pattern of tensor_plan is not valid",
                expected=f'a text of at most {MAXIMUM_PATTERN_BYTES} bytes, such as "*.qkv.weight"',
                got=repr(pattern),
            )
        if split not in SPLITS:
            raise PlanError(
                f"The split of {pattern!r} in tensor_plan is none that there is",
                expected=" or ".join(map(repr, SPLITS)),
                got=repr(split),
            )
    return dict(given)


def tensor_rules(
    tensor_plan: str | Mapping[str, str], own: Sequence[Rule], tensors: Iterable[graph_pb2.TensorSpec], servers: int
) -> list[run_pb2.TensorRule]:
    """Return the rules for a model's parameters on so many servers a stage; none: the coordinator looks for all.

    own: those of the model's modules themselves, which come first. PlanError for a pattern that matches no parameter,
    and for a ready plan that is not for this model.
    """
    if servers == 1:
        return []
    parameters = [spec for spec in tensors if spec.kind == graph_pb2.TENSOR_KIND_PARAMETER]
    if not isinstance(tensor_plan, str):
        rules = [*own, *tensor_plan.items()]
    elif tensor_plan != AUTO:
        rules = [*own, *_ready_rules(tensor_plan, parameters, servers)]
    else:
        # It looks for what no rule before it is about; without rules it does so anyway.
        rules = [*own, ("*", AUTO)] if own else []
    for pattern, split in rules:
        if split != AUTO and not _matched(pattern, parameters):
            raise PlanError(
                f"The pattern {pattern!r} of the tensor plan matches no parameter",
                expected=f"one that matches some of the model's: {_shown(parameters)}",
                got=repr(pattern),
                remedy='write it as in fnmatch: "*" stands for any text, dots included',
            )
    return [run_pb2.TensorRule(pattern=pattern, split=split) for pattern, split in rules]


def split_of(spec: graph_pb2.TensorSpec, rules: Iterable[run_pb2.TensorRule]) -> str:
    """Return what rules say of a parameter: the first that one of its names matches counts."""
    return next((rule.split for rule in rules if _matches(rule.pattern, spec)), WHOLE)


def check_optimizer(
    name: str, trained: Collection[str], rules: Sequence[run_pb2.TensorRule], tensors: Iterable[graph_pb2.TensorSpec]
) -> None:
    """PlanError if an optimizer needs the whole of a parameter that rules split. trained: TensorSpec.name of each."""
    if name not in NEED_WHOLE_PARAMETERS:
        return
    for spec in tensors:
        if spec.name not in trained or not spec.requires_grad:
            continue
        split = split_of(spec, rules)
        if split not in (WHOLE, AUTO):
            raise PlanError(
                f"{name} needs the whole of a parameter, and {spec.name} is split between servers",
                expected=f"an optimizer that works by elements, such as AdamW, or {spec.name} whole",
                got=f"{name}, and {spec.name} split by {split}",
                remedy="use another optimizer, or stages instead of tensor",
            )


def _ready_rules(name: str, parameters: Sequence[graph_pb2.TensorSpec], servers: int) -> list[Rule]:
    """Return the rules of a ready plan, but for vocabularies that the model lacks, or that do not divide."""
    missing = [pattern for pattern, split in READY_PLANS[name] if split != VOCAB and not _matched(pattern, parameters)]
    if missing:
        raise PlanError(
            f"The tensor plan {name!r} is for another model",
            expected=f"parameters that match {', '.join(missing)}",
            got=_shown(parameters),
            remedy='use tensor_plan="auto", or write rules, as in {"*.qkv.weight": "column"}',
        )
    rules = []
    for pattern, split in READY_PLANS[name]:
        found = _matched(pattern, parameters)
        if split != VOCAB or (found and not any(spec.shape[0] % servers for spec in found)):
            rules.append((pattern, split))
    return rules


def _matched(pattern: str, parameters: Iterable[graph_pb2.TensorSpec]) -> list[graph_pb2.TensorSpec]:
    return [spec for spec in parameters if _matches(pattern, spec)]


def _matches(pattern: str, spec: graph_pb2.TensorSpec) -> bool:
    return any(fnmatchcase(name, pattern) for name in spec.names)


def _shown(parameters: Sequence[graph_pb2.TensorSpec]) -> str:
    names = ", ".join(spec.name for spec in parameters[:_SHOWN]) or "none"
    return f"{names} and {len(parameters) - _SHOWN} more" if len(parameters) > _SHOWN else names
