"""The allow-list: every name stands for something, both sides agree, and nothing on it is dangerous."""

from __future__ import annotations

import pytest
import torch

from gradwire.graph import serialise
from gradwire_protocol.errors import ModelError
from gradwire_protocol.operators import (
    ALLOWED_OPERATORS,
    HIDDEN_MUTATIONS,
    PYTHON_FUNCTIONS,
    UNANNOTATED_ALIASES,
    is_allowed,
)
from gradwire_stage.operators import PYTHON_IMPLEMENTATIONS, resolve

ATEN = sorted(ALLOWED_OPERATORS - PYTHON_FUNCTIONS)


def overload(target: str) -> torch._ops.OpOverload:
    _, name, variant = target.split(".")
    found = getattr(getattr(torch.ops.aten, name), variant)
    assert isinstance(found, torch._ops.OpOverload)
    return found


def test_every_name_resolves() -> None:
    assert len(ATEN) > 500
    for target in ATEN:
        assert str(overload(target)) == target
        assert callable(resolve(target))
    for target in PYTHON_FUNCTIONS:
        assert resolve(target) is PYTHON_IMPLEMENTATIONS[target]


def test_both_sides_know_the_same_python_functions() -> None:
    exported = {f"python.{name}" for name in serialise._PYTHON_NAMES.values()}
    assert exported == PYTHON_FUNCTIONS == PYTHON_IMPLEMENTATIONS.keys()


def test_tables_name_allowed_operators_only() -> None:
    assert HIDDEN_MUTATIONS.keys() <= ALLOWED_OPERATORS
    assert UNANNOTATED_ALIASES <= ALLOWED_OPERATORS
    for target in UNANNOTATED_ALIASES:  # the schema says nothing, or the table would not be needed
        assert not any(argument.alias_info for argument in overload(target)._schema.arguments)


def test_nothing_on_the_list_reaches_outside_its_tensors() -> None:
    forbidden = (
        "set_",
        "resize",
        "as_strided",
        "file",
        "storage_",
        "pin_memory",
        "unsafe_index",
        "share",
        "cuda",
        "record",
    )
    for target in ATEN:
        assert not any(word in target.split(".")[1] for word in forbidden), target
    for target in (
        "aten.set_.source_Tensor",
        "aten.resize_.default",
        "aten.from_file.default",
        "prims.add.default",
        "x",
    ):
        assert not is_allowed(target)
        with pytest.raises(ModelError, match="not allowed"):
            resolve(target)


def test_the_operators_of_common_models_are_on_the_list() -> None:
    for name in (
        *("linear.default", "embedding.default", "layer_norm.default", "scaled_dot_product_attention.default"),
        *("conv2d.default", "batch_norm.default", "max_pool2d.default", "lstm.input", "gru.input", "einsum.default"),
        *("cross_entropy_loss.default", "rms_norm.default", "silu.default", "cumsum.default", "index.Tensor"),
        *("dropout.default", "softmax.int", "tril.default", "masked_fill.Scalar", "to.dtype", "view.default"),
    ):
        assert is_allowed(f"aten.{name}")
