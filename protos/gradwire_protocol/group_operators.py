"""Operators that the tensor-parallel servers of a stage run together, as plain names with their arguments.

The coordinator puts them into graphs that it has split; stage servers run them. `x` is a value of which each server has
the whole, or a part: of one dimension, which is made of `sections`, an equal part of each. `dim` is from 0.

| name | arguments | forward | backward |
|---|---|---|---|
| COPY | x | whole to whole; nothing to do | adds the gradients of all servers |
| SUM | x | adds what the servers have | nothing to do |
| SPLIT | x, dim, sections | whole to own part | brings the parts together |
| GATHER | x, dim, sections | brings the parts together | whole to own part |
| EMBEDDING | table, indices, padding_idx | looks up the own part of a table; zeros for other rows | of the own part |
| CROSS_ENTROPY | as aten.cross_entropy_loss | of scores of whose classes each has a part | of the own part |
| DROPOUT | x, p, train, dim, sections | as aten.dropout of the whole, of the own part | likewise |
| ATTENTION | as aten.scaled_dot_product_attention | with dropout, of the own heads, as of the whole | likewise |

A gradient of a whole value is whole, and the same at all servers; that of a part is of this part.
"""

from __future__ import annotations

NAMESPACE = "gradwire"
COPY, SUM, SPLIT, GATHER = (f"{NAMESPACE}.group_{name}" for name in ("copy", "sum", "split", "gather"))
EMBEDDING = f"{NAMESPACE}.group_embedding"
CROSS_ENTROPY = f"{NAMESPACE}.group_cross_entropy"
DROPOUT = f"{NAMESPACE}.group_dropout"
ATTENTION = f"{NAMESPACE}.group_attention"

GROUP_OPERATORS = frozenset({COPY, SUM, SPLIT, GATHER, EMBEDDING, CROSS_ENTROPY, DROPOUT, ATTENTION})
# How often servers exchange something in one call, forward and backward.
FORWARD_EXCHANGES = {SUM: 1, GATHER: 1, CROSS_ENTROPY: 2}
BACKWARD_EXCHANGES = {COPY: 1, SPLIT: 1}
