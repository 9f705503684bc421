"""Puts together the graph message of one captured program: inputs, tensors, operations, outputs, cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.export.graph_signature import InputKind, OutputKind

from gradwire.graph.batch import BatchLayout, Leaf
from gradwire.graph.capture import Captured
from gradwire.graph.costs import Costs
from gradwire.graph.loss import as_sum_and_weight
from gradwire.graph.normalise import AliasSets, normalise
from gradwire.graph.operations import Flat, Name, Operation
from gradwire.graph.serialise import flatten
from gradwire.graph.sizes import Sizes, fixed_spec
from gradwire.graph.source import Location, user_name
from gradwire.graph.tensors import TensorTable, refuse_lost_state
from gradwire.graph.wrapper import KEEP
from gradwire_protocol.errors import ModelError
from gradwire_protocol.v1 import graph_pb2 as pb


@dataclass(frozen=True)
class Draft:
    """A captured program as a flat list, before it is made a graph for one purpose."""

    captured: Captured
    flat: Flat
    uses: dict[str, str]  # value of a tensor use → tensor
    inputs: dict[str, tuple[Leaf, pb.ValueSpec]]
    updates: dict[str, str]  # value → tensor whose new value it is
    losses: list[str]  # loss, weight
    outputs: list[str]  # leaves of the model's output that are values
    specs: dict[str, pb.ValueSpec]
    rows: int | None  # of every micro-batch, where they are fixed

    def weighted(self) -> Draft | None:
        """The same with a mean cross entropy as (sum, weight); None if the loss is none."""
        if len(self.losses) != 1:
            return None
        rewritten = as_sum_and_weight(self.flat.operations, self.losses[0], self.specs)
        if rewritten is None:
            return None
        specs = {operation.name: operation.node.output for operation in rewritten.operations}
        return Draft(
            captured=self.captured,
            flat=Flat(rewritten.operations, self.flat.attributes, self.flat.outputs),
            uses=self.uses,
            inputs=self.inputs,
            updates=self.updates,
            losses=[self.losses[0], rewritten.weight],
            outputs=self.outputs,
            specs={**self.specs, **specs},
            rows=self.rows,
        )


def draft(
    captured: Captured, leaves: Sequence[Leaf], batch: BatchLayout, table: TensorTable, loss_source: str
) -> Draft:
    """Flatten a captured program. `leaves` are its tensor inputs, in order."""
    program, layout = captured.program, captured.outputs
    refuse_lost_state(layout.assigned_attributes, program)
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    placeholders: dict[str, str] = {}
    uses: dict[str, str] = {}
    for placeholder, value, tensor in table.uses(program):
        placeholders[placeholder] = value
        uses[value] = tensor
    given = [item.arg.name for item in signature.input_specs if item.kind is InputKind.USER_INPUT]
    unknown = [item.kind.name for item in signature.input_specs if item.arg.name not in {*placeholders, *given}]
    unknown += [item.kind.name for item in signature.output_specs if item.kind is not OutputKind.USER_OUTPUT]
    if unknown or len(given) != len(leaves):
        raise ModelError(
            "The exported program takes or gives things that a graph cannot hold",
            got=", ".join(unknown) or f"{len(given)} inputs",
            remedy="use tensors only; scripted modules and custom objects cannot travel",
        )
    rows = next(values[name].shape[0] for name, leaf in zip(given, leaves, strict=True) if leaf.batched)
    dynamic = [
        (values[name].shape[dimension], batch.example_sizes[dim])
        for name, leaf in zip(given, leaves, strict=True)
        for dimension, dim in leaf.dims
    ]
    sizes = Sizes(rows, batch.rows, dynamic)
    inputs: dict[str, tuple[Leaf, pb.ValueSpec]] = {}
    for name, leaf in zip(given, leaves, strict=True):
        placeholders[name] = leaf.value
        inputs[leaf.value] = (leaf, sizes.spec(values[name], leaf.label))
    flat = flatten(program, placeholders, sizes, Costs(sizes), loss_source)
    for value, attribute in flat.attributes.items():
        uses[value] = table.constant(value, attribute)
    _refuse_parameter_writes(flat.operations, uses, table)
    results = [item.text if isinstance(item, Name) else "" for item in flat.outputs]
    leaf_count = sum(layout.is_tensor)
    updated = results[layout.loss + leaf_count :]
    return Draft(
        captured=captured,
        flat=flat,
        uses=uses,
        inputs=inputs,
        updates=dict(zip(updated, (table.first_name(user_name(n)) for n in layout.assigned_buffers), strict=True)),
        losses=results[: layout.loss],
        outputs=results[layout.loss : layout.loss + leaf_count],
        specs={
            **{operation.name: operation.node.output for operation in flat.operations},
            **{value: spec for value, (_, spec) in inputs.items()},
            **{value: fixed_spec(table.tensors[tensor]) for value, tensor in uses.items()},
        },
        rows=batch.micro_batch_rows,
    )


def graph_of(source: Draft, kind: pb.GraphKind) -> pb.Graph:
    """Make the graph for one purpose; its outputs are the loss, or the leaves of the model's output."""
    predicts = kind == pb.GRAPH_KIND_PREDICT
    wanted = source.outputs if predicts else source.losses
    inputs = {value: item for value, item in source.inputs.items() if not (predicts and item[0].is_target)}
    normal = normalise(source.flat.operations, wanted, source.uses, list(source.inputs), source.updates)
    read = {value for operation in normal.operations for value in operation.reads} | set(wanted)
    mutated = list(dict.fromkeys(source.uses[value] for value in normal.mutated_tensors))
    return pb.Graph(
        kind=kind,
        inputs=[
            pb.GraphInput(value=value, label=leaf.label, spec=spec, batched=leaf.batched)
            for value, (leaf, spec) in inputs.items()
        ],
        tensors=[pb.TensorUse(value=value, tensor=name) for value, name in source.uses.items() if value in read],
        nodes=[operation.node for operation in normal.operations],
        outputs=_outputs(source, wanted, predicts),
        allowed_cuts=normal.allowed_cuts,
        buffer_updates=[pb.BufferUpdate(value=value, tensor=name) for value, name in source.updates.items()],
        mutated_tensors=mutated,
        mutated_inputs=[value for value in normal.mutated_inputs if value in inputs],
    )


def loss_leaks_into_output(source: Draft) -> bool:
    """Whether the model's output depends on operations of the loss (which changed it in place)."""
    normal = normalise(source.flat.operations, source.outputs, source.uses, list(source.inputs), source.updates)
    targets = {value for value, (leaf, _) in source.inputs.items() if leaf.is_target}
    return any(
        (not operation.in_model and operation.node.target != str(KEEP)) or targets.intersection(operation.reads)
        for operation in normal.operations
    )


def _outputs(source: Draft, wanted: Sequence[str], predicts: bool) -> list[pb.GraphOutput]:
    if not predicts:
        return [pb.GraphOutput(value=value) for value in wanted]
    remaining = iter(wanted)
    outputs = []
    for is_value in source.captured.outputs.is_tensor:
        value = next(remaining) if is_value else ""
        shape = list(source.specs[value].shape) if value else []
        outputs.append(pb.GraphOutput(value=value, batched=bool(shape) and _by_row(shape[0], source.rows)))
    return outputs


def _by_row(size: pb.AffineSize, rows: int | None) -> bool:
    """Whether a first dimension is the batch's; where the rows are fixed, it counts as such if it is as long."""
    return (size.per_row > 0 and size.fixed == 0) if rows is None else size.fixed == rows


def _refuse_parameter_writes(operations: Sequence[Operation], uses: Mapping[str, str], table: TensorTable) -> None:
    """ModelError for an operator that writes to a parameter: micro-batches in flight would see it change."""
    memory = AliasSets(operations, uses)
    parameters = {
        memory.root(value): name for value, name in uses.items() if table.spec(name).kind == pb.TENSOR_KIND_PARAMETER
    }
    for operation in operations:
        for value in operation.writes:
            name = parameters.get(memory.root(value))
            if name is not None:
                node = operation.node
                raise ModelError(
                    f"The forward pass writes to parameter '{name}', at {Location(node.module_path, node.source)}",
                    expected="parameters that only the optimizer changes",
                    got=node.target,
                    remedy="make it a buffer, or clone() what is made from the parameter before it is changed in place",
                )
