"""The rules of all operators that can work on parts of values."""

from __future__ import annotations

from gradwire_coordinator.tensor import cuts, elementwise, products, reductions, shapes
from gradwire_coordinator.tensor.rewriter import Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **cuts.RULES,
    **reductions.RULES,
    **products.RULES,
}
