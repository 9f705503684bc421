"""Looks for parameters to split: columns whose outputs stay split until rows take them up, with one sum behind them.

Each product of a whole value is tried as the first column, by rewriting the nodes behind it. Where another computed
value would have to be split with it (keys beside queries, a gate beside what it gates), the product that it comes from
joins.
A head whose scores go into a cross entropy is split by its classes, and tables of many rows by these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gradwire_coordinator.graph_index import GraphIndex, read_values
from gradwire_coordinator.tensor.parts import Part
from gradwire_coordinator.tensor.rewriter import NeedsPartError, NotKeptError, Rewriter
from gradwire_coordinator.tensor.rules import RULES
from gradwire_coordinator.tensor.tensor_plan import COLUMN, ROW, VOCAB, TensorPlan
from gradwire_coordinator.tensor.uses import Use
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import graph_pb2

_MOST_COLUMNS = 8
# A table, or a head, with so many rows for each column and so many elements is worth its exchanges.
_TALL = 4
_LARGE = 2**16
_MOST_STEPS = 64


def look_for_splits(
    plan: TensorPlan,
    index: GraphIndex,
    tensors: Mapping[str, graph_pb2.TensorSpec],
    learned: frozenset[str],
    kept: Collection[str],
) -> PlanError | None:
    """Add what can be split well to a plan; return what was in the way of the first product that could not be.

    kept: parameters that are settled already.
    """
    search = _Search(plan, index, tensors, learned, frozenset(kept))
    for use in sorted((use for uses in plan.uses.values() for use in uses), key=search.position):
        if not use.is_embedding and search.is_free(use.tensor):
            search.try_from(use)
    for tensor, uses in plan.uses.items():
        if all(use.is_embedding for use in uses) and search.is_free(tensor) and search.is_tall(tensor, 0):
            search.add_table(tensor)
    return search.obstacle


class _Search:
    def __init__(
        self,
        plan: TensorPlan,
        index: GraphIndex,
        tensors: Mapping[str, graph_pb2.TensorSpec],
        learned: frozenset[str],
        kept: frozenset[str],
    ) -> None:
        self._plan = plan
        self._index = index
        self._tensors = tensors
        self._learned = learned
        self._kept = kept
        self._product_of = {use.node.name: use for uses in plan.uses.values() for use in uses if not use.is_embedding}
        # Of the attempt in progress: the rows that it has met.
        self._rows: list[str] = []
        # Why the first product that almost could be split was not: something does not divide.
        self.obstacle: PlanError | None = None

    def position(self, use: Use) -> int:
        return self._index.producers[use.node.name]

    def is_free(self, tensor: str) -> bool:
        return (
            tensor not in self._plan.splits
            and tensor not in self._kept
            and self._tensors[tensor].kind == graph_pb2.TENSOR_KIND_PARAMETER
        )

    def is_tall(self, tensor: str, rows: int) -> bool:
        """Whether a matrix is large, and many times as long as wide."""
        count, width = self._tensors[tensor].shape[rows], self._tensors[tensor].shape[1 - rows]
        return count >= _TALL * width and count * width >= _LARGE and count % self._plan.shards == 0

    def add_table(self, tensor: str) -> None:
        self._plan.add(tensor, VOCAB)

    def try_from(self, first: Use) -> None:
        """Split the products that must be, beginning with one; or none, if that does not work out."""
        columns = [first]
        # What stays whole although it is wanted split; and what joined last for such a value, which it did not need to.
        tolerated: list[str] = []
        joined: tuple[str, list[Use]] | None = None
        for _ in range(_MOST_COLUMNS):
            self._rows = []
            missing = self._attempt(columns, tolerated)
            if missing is None:
                return
            for tensor in [*(use.tensor for use in columns), *self._rows]:
                self._plan.remove(tensor)
            if isinstance(missing, NeedsPartError):
                joining = [use for use in self._products_behind(missing.value) if self._is_single(use)]
                joining = [use for use in joining if use not in columns]
                if joining:
                    joined = (missing.value, joining) if missing.optional else None
                    columns = [*columns, *joining]
                    continue
                if missing.optional:
                    # It comes from no product, as a table of biases for positions does: each server takes its part.
                    tolerated.append(missing.value)
                    continue
                return
            if joined is None:
                return
            # Keys and values may have fewer heads than there are servers.
            value, uses = joined
            columns = [use for use in columns if use not in uses]
            tolerated.append(value)
            joined = None

    def _attempt(self, columns: list[Use], tolerated: list[str]) -> Exception | None:
        """Add columns and their rows to the plan; None if it works out, or what is in the way."""
        head = len(columns) == 1 and self.is_tall(columns[0].tensor, columns[0].outputs)
        if not head and not all(self._is_single(use) for use in columns):
            return NotKeptError()
        try:
            for use in columns:
                self._plan.add(use.tensor, VOCAB if head and not self._is_single(use) else COLUMN)
            self._follow(columns, tolerated)
        except PlanError as error:
            self.obstacle = self.obstacle or error
            return error
        except (NeedsPartError, NotKeptError) as error:
            return error
        if not self._rows:
            # Closed by a cross entropy, or by sums over what is split.
            if not head:
                return NotKeptError()
            self._plan.remove(columns[0].tensor)
            self._plan.add(columns[0].tensor, VOCAB)
        return None

    def _is_single(self, use: Use) -> bool:
        return len(self._plan.uses[use.tensor]) == 1 and self.is_free(use.tensor)

    def _follow(self, columns: list[Use], tolerated: list[str]) -> None:
        """Rewrite what depends on the columns until nothing is split any more; the errors say what is in the way."""
        nodes = self._index.graph.nodes
        rewriter = Rewriter(
            self._index,
            self._tensors,
            self._plan.shards,
            RULES,
            self._plan.part_of,
            self._claim,
            self._learned,
            trying=True,
            tolerated=tolerated,
        )
        names = {use.node.name for use in columns}
        split = set[str]()
        last = 0
        position = min(map(self.position, columns))
        while position < len(nodes) and (names or position <= last):
            node = nodes[position]
            if node.name in names or any(value in split for value in read_values(node)):
                names.discard(node.name)
                place = rewriter.step(node)
                if isinstance(place, Part | tuple):
                    split.add(node.name)
                    last = max([last, *self._index.readers.get(node.name, ())])
            position += 1

    def _claim(self, tensor: str, part: Part) -> None:
        """Take a weight that a split value is multiplied by as a row."""
        uses = self._plan.uses.get(tensor, [])
        if len(uses) == 1 and not uses[0].is_embedding and self.is_free(tensor) and part.dim == 1 - uses[0].outputs:
            self._plan.add(tensor, ROW)
            self._plan.suggest(tensor, part)
            self._rows.append(tensor)

    def _products_behind(self, value: str) -> list[Use]:
        """Return the nearest products that a value is computed from."""
        found: list[Use] = []
        waiting, seen = [value], set[str]()
        while waiting and len(seen) < _MOST_STEPS:
            name = waiting.pop()
            if name in seen or name not in self._index.producers:
                continue
            seen.add(name)
            if name in self._product_of:
                found.append(self._product_of[name])
                continue
            waiting += read_values(self._index.graph.nodes[self._index.producers[name]])
        return found
