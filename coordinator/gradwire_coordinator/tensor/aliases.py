"""Which values of a graph share memory, before and after it is rewritten: whoever reads must see what was written.

Where an operator has no rule, it works on the whole, which is new memory. A view made so does not see what is written
into the parts later, nor do they see what is written into it. Leaves to others: the graph's rewriting (`rewriter.py`).
"""

from __future__ import annotations

from gradwire_coordinator.graph_index import GraphIndex, read_values
from gradwire_coordinator.tensor.calls import written_values
from gradwire_protocol.errors import PlanError
from gradwire_protocol.v1 import graph_pb2

# Operators whose value shares the memory of their first operand, or may.
_TABLE = """
    _conj.default adjoint.default alias.default atleast_1d.default atleast_2d.default atleast_3d.default
    broadcast_to.default chunk.default conj.default contiguous.default detach.default diagonal.default dsplit.array
    dsplit.int expand.default expand_as.default flatten.using_ints hsplit.array hsplit.int imag.default
    lift_fresh.default linalg_diagonal.default mH.default mT.default matrix_H.default moveaxis.int moveaxis.intlist
    movedim.int movedim.intlist narrow.Tensor narrow.default numpy_T.default permute.default positive.default
    ravel.default real.default reshape.default reshape_as.default resolve_conj.default resolve_neg.default select.int
    slice.Tensor split.Tensor split.sizes split_with_sizes.default squeeze.default squeeze.dim squeeze.dims
    swapaxes.default swapdims.default t.default tensor_split.indices tensor_split.sections to.device to.dtype
    to.dtype_layout to.other transpose.int type_as.default unbind.int unflatten.int unfold.default unsqueeze.default
    view.default view.dtype view_as.default view_as_complex.default view_as_real.default vsplit.array vsplit.int
"""
_VIEWS = frozenset(f"aten.{name}" for name in _TABLE.split()) | {"python.getitem"}


class Aliases:
    """The memory of one graph's values. `follow` each node in order."""

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        # Value -> whose memory it shares in the given graph, and in the rewritten one; others have their own.
        self._before: dict[str, str] = {}
        self._after: dict[str, str] = {}
        # The views of a memory in the given graph.
        self._views: dict[str, list[str]] = {}
        self._read_at_end = {output.value for output in index.graph.outputs}
        self._read_at_end |= {update.value for update in index.graph.buffer_updates}

    def follow(self, node: graph_pb2.Node, *, on_copies: bool) -> None:
        """Take in a node of the given graph. on_copies: it has got the whole of what servers have parts of.

        PlanError if it writes into memory that somebody reads later who has got another one for it.
        """
        written = written_values(node)
        for value in written:
            self._check(node, value)
        source = next(iter(written), "")
        if not source and node.target in _VIEWS:
            source = next(read_values(node), "")
        if not source:
            return
        memory = self._before[node.name] = self._before.get(source, source)
        self._after[node.name] = node.name if on_copies else self._after.get(source, source)
        self._views.setdefault(memory, []).append(node.name)

    def _check(self, node: graph_pb2.Node, value: str) -> None:
        memory, own = self._before.get(value, value), self._after.get(value, value)
        position = self._index.producers[node.name]
        for other in [memory, *self._views.get(memory, [])]:
            is_read = other in self._read_at_end or any(at > position for at in self._index.readers.get(other, ()))
            if is_read and self._after.get(other, other) != own:
                raise PlanError(
                    f"In the {self._index.name} graph, an operator writes into a value of which another one is a view, "
                    "which tensor-parallel servers have as a part and as the whole",
                    expected="operators that can work on parts (views of other dimensions, for example)",
                    got=f"{node.target} ({node.name}, {node.source or node.module_path}), and {other}",
                    remedy="write into a copy of it, or leave the parameters that it comes from whole in tensor_plan",
                )
