"""The rules of all operators that can work on parts of values."""

from __future__ import annotations

from gradwire_coordinator.tensor import elementwise, products, shapes
from gradwire_coordinator.tensor.rewriter import Rule

RULES: dict[str, Rule] = {**elementwise.RULES, **shapes.RULES, **products.RULES}
