"""Rewrites one graph for servers that share its operators: node after node, by the rules of operators.

A value is *whole* (every server has all of it, and all of its gradient, the same at each) or a `Part`. Where a rule
keeps the split of what it reads, the node stays, with local sizes. Otherwise parts are brought together before it. A
whole value that a split computation reads goes through COPY, which adds up its gradient's shares.

Leaves to others: what is known of values (`known_values.py`), what operators do with parts (`rules.py`), and which
parameters are split (`tensor_plan.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from gradwire_coordinator.graph_index import GraphIndex, read_values
from gradwire_coordinator.tensor.aliases import Aliases
from gradwire_coordinator.tensor.calls import of_integer, of_integers, of_value, rename_values, written_values
from gradwire_coordinator.tensor.known_values import KnownValues, Place
from gradwire_coordinator.tensor.parts import Part
from gradwire_protocol.errors import GradwireError, PlanError
from gradwire_protocol.group_operators import COPY, GATHER, SPLIT, SUM
from gradwire_protocol.v1 import graph_pb2

# Node -> what the rewritten one gives; raises NotKeptError where the operator cannot work on parts.
Rule = Callable[["Rewriter", graph_pb2.Node], Place]


class NotKeptError(Exception):
    """An operator needs the whole of what it reads."""


class NeedsPartError(Exception):
    """Looking for a plan: a computed value is whole that must be split, too, or, if it is `optional`, had better be."""

    def __init__(self, value: str, *, optional: bool) -> None:
        super().__init__(value)
        self.value = value
        self.optional = optional


@dataclass(frozen=True)
class Rewritten:
    """A graph for one of the servers, and what its values are."""

    graph: graph_pb2.Graph
    # Values that are parts.
    parts: frozenset[str]
    # Of each position in the old graph, the end included: where its node's part of the new one begins.
    starts: tuple[int, ...]


class Rewriter(KnownValues):
    """One graph on its way. `run()` once; or, to try a plan, `step` for some of its nodes."""

    def __init__(
        self,
        index: GraphIndex,
        tensors: Mapping[str, graph_pb2.TensorSpec],
        shards: int,
        rules: Mapping[str, Rule],
        part_of_tensor: Callable[[str], Part | None],
        suggest: Callable[[str, Part], None],
        learned: frozenset[str],
        *,
        trying: bool = False,
        tolerated: Collection[str] = (),
    ) -> None:
        """trying: raise NotKeptError or NeedsPartError where a plan would need more than its products' sums.

        tolerated: computed values that may be whole all the same. The rest is as for KnownValues.
        """
        super().__init__(index, tensors, shards, part_of_tensor, suggest, learned)
        self._rules = rules
        self._trying = trying
        self._tolerated = tolerated
        self._nodes: list[graph_pb2.Node] = []
        self._starts: list[int] = []
        # What was made of a value, by kind and value; copies hold for a stretch without an exchange forward.
        self._made: dict[tuple[object, ...], str] = {}
        self._copies: list[str] = []
        self._exchanges = 0
        self._aliases = Aliases(index)
        self._renamed: dict[str, str] = {}
        self._current = graph_pb2.Node()

    # --- what rules make of operands

    def whole(self, value: str) -> str:
        """Return the whole of a value."""
        part = self.part_of(value)
        if part is None:
            return value
        if self._trying:
            raise NotKeptError
        return self._derived(("whole", value), value, "whole", GATHER, _along(part), None)

    def copied(self, value: str) -> str:
        """Return a whole value for a computation on parts, of whose gradient each server makes a share."""
        if value not in self._learned or self._current.no_grad:
            return value
        made = self._derived(("copy", value, self._exchanges), value, "copy", COPY, [], None)
        if made not in self._copies:
            self._copies.append(made)
        return made

    def part(self, value: str, part: Part, *, optional: bool = False) -> str:
        """Return the part of a value that is wanted, out of what there is of it.

        optional: a plan may do so, though it costs bringing its gradient together.
        """
        present = self.part_of(value)
        if present == part:
            return value
        computed = value in self._learned and value not in self.index.tensors
        if present is None and self._trying and computed and value not in self._tolerated:
            raise NeedsPartError(value, optional=optional)
        return self._derived(("part", value, part), self.whole(value), "part", SPLIT, _along(part), part)

    def needs_product(self) -> None:
        """Say that what follows would make a sum that is no product's, which no plan is looked for with."""
        if self._trying:
            raise NotKeptError

    # --- what rules give

    def keep(self, node: graph_pb2.Node, place: Place) -> Place:
        """Put a node that works on parts, or gives some."""
        self._scale(node)
        self._put(node, place)
        return place

    def summed(self, node: graph_pb2.Node, then: Callable[[str, str], graph_pb2.Node] | None = None) -> Place:
        """Put a node that gives a share of its value on each server, their sum, and what comes after it, if anything.

        then: (sum, name) -> the last node, which has the name of the first.
        """
        name = node.name
        node.name = self._new_name(f"{name}.share")
        self._scale(node)
        self._put(node, None)
        self._exchanges += 1
        total = self.make(name if then is None else f"{name}.sum", SUM, [of_value(node.name)], node.output, None)
        if then is not None:
            last = then(total, name)
            self._put(last, None)
        return None

    def make(
        self,
        name: str,
        target: str,
        arguments: Sequence[graph_pb2.Argument],
        output: graph_pb2.ValueSpec,
        place: Place,
    ) -> str:
        """Put a further node beside the current one; return its name. output: of the whole."""
        node = self.beside(name, target, arguments, output)
        self._put(node, place)
        return node.name

    def beside(
        self, name: str, target: str, arguments: Sequence[graph_pb2.Argument], output: graph_pb2.ValueSpec
    ) -> graph_pb2.Node:
        """Return a further node, in the same region as the current one."""
        current = self._current
        return graph_pb2.Node(
            name=name if name == current.name else self._new_name(name),
            target=target,
            arguments=arguments,
            module_path=current.module_path,
            source=current.source,
            no_grad=current.no_grad,
            autocast=current.autocast,
            output=output,
        )

    # --- the way through a graph

    def step(self, node: graph_pb2.Node) -> Place:
        """Rewrite one node, the next of the old graph; return what it gives."""
        self._current = node
        self._starts.append(len(self._nodes))
        read = list(dict.fromkeys(read_values(node)))
        on_copies = False
        if not any(self._is_split(value) for value in read):
            self._put(_copy(node), None)
        else:
            try:
                rule = self._rules.get(node.target)
                if rule is None:
                    raise NotKeptError
                rule(self, _copy(node))
            except NotKeptError:
                if self._trying:
                    raise
                self._on_wholes(node, read)
                on_copies = True
            except PlanError as error:
                raise self._located(error) from error
        self._aliases.follow(node, on_copies=on_copies)
        if node.mutated_arguments or node.mutated_keyword_arguments:
            # Whatever was made of it, or of what shares its memory, is of before.
            self._made.clear()
        return self._places[node.name]

    def run(self) -> Rewritten:
        """Rewrite the whole graph."""
        graph = self.index.graph
        for node in graph.nodes:
            self.step(node)
        self._starts.append(len(self._nodes))
        if graph.nodes:
            self._current = graph_pb2.Node(module_path=graph.nodes[-1].module_path)
        made = graph_pb2.Graph(
            kind=graph.kind,
            inputs=graph.inputs,
            tensors=graph.tensors,
            mutated_tensors=graph.mutated_tensors,
            mutated_inputs=graph.mutated_inputs,
        )
        for output in graph.outputs:
            if output.value and self.part_of(output.value) is not None:
                self._give_whole(output.value)
            made.outputs.add(value=output.value, batched=output.batched)
        for use in made.tensors:
            use.value = self._renamed.get(use.value, use.value)
        for update in graph.buffer_updates:
            made.buffer_updates.add(value=self.whole(update.value), tensor=update.tensor)
        made.nodes.extend(self._nodes)
        barred = self._barred()
        made.allowed_cuts.extend(
            cut for cut in (self._starts[old] for old in graph.allowed_cuts) if cut not in barred and cut > 0
        )
        parts = {name for name, place in self._places.items() if isinstance(place, Part)}
        return Rewritten(made, frozenset(parts - set(self.index.tensors)), tuple(self._starts))

    def _give_whole(self, value: str) -> None:
        """Put the whole of a part at the end, under the part's name: clients ask for it by that."""
        last = self.whole(value)
        names = {value: self._new_name(f"{value}.own"), last: value}
        for node in self._nodes:
            rename_values(node, names)
            node.name = names.get(node.name, node.name)
        for key, made in self._made.items():
            self._made[key] = names.get(made, made)
        self._renamed |= names
        self._places[names[value]], self._places[value] = self._places[value], None

    def _on_wholes(self, node: graph_pb2.Node, read: Sequence[str]) -> None:
        """Bring together what an operator reads that has no rule, or one that says so."""
        names = {}
        for value in read:
            if isinstance(self.place(value), tuple):
                raise PlanError(
                    f"The {self.index.name} graph uses a tuple of parts as a whole",
                    expected="getitem of its items",
                    got=f"{node.target} ({node.name})",
                    remedy="leave the parameters that it comes from whole in tensor_plan",
                )
            names[value] = self.whole(value)
        made = _copy(node)
        if any(names.get(value, value) != value for value in written_values(node)):
            raise PlanError(
                f"In the {self.index.name} graph, an operator writes into a split value, but needs the whole of it",
                got=f"{node.target} ({node.name}, {node.source or node.module_path})",
                remedy="leave the parameters that it comes from whole in tensor_plan",
            )
        rename_values(made, names)
        self._put(made, None)

    def _put(self, node: graph_pb2.Node, place: Place) -> None:
        self._take(node, place)
        if isinstance(place, Part):
            size = node.output.shape[place.dim]
            size.fixed //= self.shards
        self._nodes.append(node)

    def _derived(
        self,
        key: tuple[object, ...],
        value: str,
        suffix: str,
        target: str,
        arguments: Sequence[graph_pb2.Argument],
        place: Part | None,
    ) -> str:
        if self._current.no_grad and key not in self._made:
            key = (*key, "without gradient")
        if key not in self._made:
            spec = graph_pb2.ValueSpec()
            spec.CopyFrom(self.spec(value))
            if target == GATHER:
                self._exchanges += 1
            self._made[key] = self.make(f"{value}.{suffix}", target, [of_value(value), *arguments], spec, place)
        return self._made[key]

    def _scale(self, node: graph_pb2.Node) -> None:
        """Each server does its share of a node's work."""
        for size in (node.flops, node.bytes):
            size.fixed //= self.shards
            size.per_row //= self.shards

    def _barred(self) -> set[int]:
        """Return where not to cut: between a copy and those who read it, for shares of gradients do not travel."""
        copies = set(self._copies)
        made: dict[str, int] = {}
        barred: set[int] = set()
        for position, node in enumerate(self._nodes):
            for value in read_values(node):
                if value in copies:
                    barred.update(range(made[value] + 1, position + 1))
            made[node.name] = position
        return barred

    def _located(self, error: GradwireError) -> PlanError:
        node = self._current
        place = node.source or node.module_path or node.name
        return PlanError(
            f"{error.message} (in {node.module_path or 'the model'}: {place})",
            expected=error.expected,
            got=error.got,
            remedy=error.remedy,
        )


def _along(part: Part) -> list[graph_pb2.Argument]:
    return [of_integer(part.dim), of_integers(part.sections)]


def _copy(node: graph_pb2.Node) -> graph_pb2.Node:
    made = graph_pb2.Node()
    made.CopyFrom(node)
    return made
