"""Checks what comes over the wire before anything is built or run from it: runs to prepare, entries to execute.

Operators and their arguments are checked where segments are built; tensor frames where they are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradwire_protocol.channels import parse_address
from gradwire_protocol.checkpoint.requests import check_save, check_stored
from gradwire_protocol.codecs import NAME_OF_CODEC
from gradwire_protocol.errors import FrameError, LimitExceeded, StaleGeneration
from gradwire_protocol.exchange_state import ALONE, ExchangeState
from gradwire_protocol.frames import (
    ELEMENT_BYTES,
    MAXIMUM_DIMENSIONS,
    MAXIMUM_RUN_CHARACTERS,
    MAXIMUM_STATE_BYTES,
    MAXIMUM_VALUE_BYTES,
)
from gradwire_protocol.gradient_codecs import parse_compression
from gradwire_protocol.optimizer_state import OptimizerState
from gradwire_protocol.program import Action, program_from_proto
from gradwire_protocol.v1 import graph_pb2, run_pb2, stage_pb2, tensors_pb2
from gradwire_stage.exchange.agreement import StepEnd
from gradwire_stage.move_checks import check_moves
from gradwire_stage.program_checks import check_program
from gradwire_stage.shard_checks import check_shards, check_split, check_spread

MAXIMUM_STAGES = 16384
MAXIMUM_MICRO_BATCHES = 65536
MAXIMUM_TENSORS = 1_000_000
# Types of autocast. Not FLOAT16: it needs the loss scaled, and one decision of all servers to skip a step.
PRECISIONS = (tensors_pb2.DATA_TYPE_UNSPECIFIED, tensors_pb2.DATA_TYPE_BFLOAT16)
_GRAPH_OF_ENTRY = {
    "train_step": graph_pb2.GRAPH_KIND_TRAIN,
    "evaluate": graph_pb2.GRAPH_KIND_EVALUATE,
    "predict": graph_pb2.GRAPH_KIND_PREDICT,
}


def _refuse_unless(right: bool, what: str, expected: str, got: object) -> None:
    if not right:
        raise FrameError(what, expected=expected, got=str(got))


def check_name(name: str, what: str) -> None:
    """Refuse an empty or overlong name of a value or tensor."""
    size = len(name.encode())
    _refuse_unless(
        1 <= size <= MAXIMUM_VALUE_BYTES, f"{what} has a wrong name", f"1 to {MAXIMUM_VALUE_BYTES} bytes", size
    )


def check_prepare(request: stage_pb2.PrepareRequest, server: str) -> stage_pb2.Peer:
    """Check a request to prepare a run on `server`; return this server's own entry of its peers."""
    size = len(request.run)
    _refuse_unless(1 <= size <= MAXIMUM_RUN_CHARACTERS, "Wrong run", f"1 to {MAXIMUM_RUN_CHARACTERS} characters", size)
    if request.server != server:
        raise StaleGeneration(
            "This server is not the one that is meant",
            expected=request.server,
            got=server,
            remedy="it was started again at the same address: let it register, and create the run again",
        )
    _refuse_unless(
        1 <= request.stages <= MAXIMUM_STAGES, "Wrong number of stages", f"1 to {MAXIMUM_STAGES}", request.stages
    )
    _refuse_unless(
        request.loss_form in graph_pb2.LossForm.values() and request.loss_form != graph_pb2.LOSS_FORM_UNSPECIFIED,
        "Wrong form of the loss",
        "MEAN_OVER_ROWS or SUM_AND_WEIGHT",
        request.loss_form,
    )
    _refuse_unless(request.precision in PRECISIONS, "Wrong precision", "unspecified or BFLOAT16", request.precision)
    codecs = list(request.activation_codecs)
    _refuse_unless(
        not codecs or (len(codecs) == request.stages - 1 and NAME_OF_CODEC.keys() >= set(codecs)),
        "Wrong codecs of boundary values",
        f"none, or {request.stages - 1} known ones",
        codecs,
    )
    own = _check_peers(request)
    shards = check_shards(request, own)
    placements = _check_placements(request, own, shards)
    _check_segments(request, own, placements, shards)
    return own


def _check_peers(request: stage_pb2.PrepareRequest) -> stage_pb2.Peer:
    by_server = {peer.server: peer for peer in request.peers}
    _refuse_unless(
        len(by_server) == len(request.peers), "A server is named twice", "unique servers", len(request.peers)
    )
    own = by_server.get(request.server)
    if own is None:
        raise FrameError("This server is not among the run's", expected=request.server, got=", ".join(by_server))
    for peer in request.peers:
        parse_address(peer.address)
    _refuse_unless(bool(own.stages), "This server hosts no stage", "at least one", 0)
    helpers = sorted(list(peer.stages) for peer in request.peers if peer.parameter_server)
    _refuse_unless(
        helpers == [[request.stages + number] for number in range(len(helpers))],
        "Wrong numbers of parameter servers",
        f"one each, from {request.stages} on",
        helpers,
    )
    replicas = {peer.replica for peer in request.peers if not peer.parameter_server}
    if len(replicas) > 1 or helpers:
        parse_compression(request.compression)
        local = request.local_steps
        _refuse_unless(
            not request.HasField("local_steps") or (0 < local.learning_rate < math.inf and 0 <= local.momentum < 1),
            "Wrong settings of local steps",
            "a learning rate above 0, a momentum from 0 to below 1",
            local,
        )
        _refuse_unless(
            not (request.HasField("local_steps") and request.shard_optimizer),
            "Replicas that train alone cannot share the optimizer's state",
            "one of both",
            "both",
        )
    return own


def _check_placements(request: stage_pb2.PrepareRequest, own: stage_pb2.Peer, shards: int) -> set[str]:
    _refuse_unless(
        len(request.tensors) <= MAXIMUM_TENSORS, "Too many tensors", f"{MAXIMUM_TENSORS} at most", len(request.tensors)
    )
    names: set[str] = set()
    for placement in request.tensors:
        spec = placement.spec
        check_name(spec.name, "A tensor")
        _refuse_unless(spec.name not in names, f"Tensor {spec.name!r} is placed twice", "unique names", spec.name)
        names.add(spec.name)
        _refuse_unless(
            spec.data_type in ELEMENT_BYTES, f"Tensor {spec.name!r} has a wrong type", "a DataType", spec.data_type
        )
        _refuse_unless(
            len(spec.shape) <= MAXIMUM_DIMENSIONS and all(0 <= size < 2**48 for size in spec.shape),
            f"Tensor {spec.name!r} has a wrong shape",
            f"at most {MAXIMUM_DIMENSIONS} dimensions, none negative",
            list(spec.shape),
        )
        check_split(spec, shards)
        holders = list(placement.holder_stages)
        _refuse_unless(
            holders == sorted(set(holders))
            and bool(holders)
            and (own.parameter_server or bool(set(holders) & set(own.stages)))
            and holders[-1] < request.stages,
            f"Tensor {spec.name!r} has wrong holders",
            f"ascending stages, one of {list(own.stages)} among them",
            holders,
        )
        known = {peer.server for peer in request.peers if peer.parameter_server}
        _refuse_unless(
            (not placement.parameter_server or placement.parameter_server in known)
            and (not own.parameter_server or placement.parameter_server == own.server),
            f"Tensor {spec.name!r} has a wrong parameter server",
            f"none, or one of {sorted(known)}",
            placement.parameter_server[:64],
        )
    return names


def _check_segments(request: stage_pb2.PrepareRequest, own: stage_pb2.Peer, placements: set[str], shards: int) -> None:
    seen: set[tuple[int, int]] = set()
    for segment in request.segments:
        name = f"The segment of stage {segment.stage}"
        _refuse_unless(
            segment.stage in own.stages, f"{name} is not for this server", str(list(own.stages)), segment.stage
        )
        _refuse_unless(
            segment.graph in _GRAPH_OF_ENTRY.values(),
            f"{name} is of no graph",
            "train, evaluate, predict",
            segment.graph,
        )
        _refuse_unless(
            (segment.graph, segment.stage) not in seen,
            f"{name} came twice",
            "one for each graph and stage",
            segment.graph,
        )
        seen.add((segment.graph, segment.stage))
        for use in segment.tensors:
            _refuse_unless(
                use.tensor in placements, f"{name} uses a tensor that is not placed here", "a placement", use.tensor
            )
        check_spread(name, segment.incoming, shards)
        check_spread(name, segment.outgoing, shards)
        for value in segment.incoming:
            check_name(value.value, "An incoming value")
            later = value.gradient_from_stage if value.HasField("gradient_from_stage") else segment.stage + 1
            _refuse_unless(
                value.from_batch
                or (
                    value.producer_stage < segment.stage
                    and value.gradient_to_stage < segment.stage
                    and segment.stage < later <= request.stages
                ),
                f"{name} has a wrong route for {value.value!r}",
                "producer and gradient_to before it, gradient_from behind it",
                value,
            )
        for made in segment.outgoing:
            check_name(made.value, "An outgoing value")
            consumers = list(made.consumer_stages)
            _refuse_unless(
                bool(consumers)
                and consumers == sorted(set(consumers))
                and segment.stage < consumers[0]
                and consumers[-1] < request.stages,
                f"{name} has wrong consumers of {made.value!r}",
                "ascending stages behind it",
                consumers,
            )


def check_bounds(request: stage_pb2.PrepareRequest, mailbox_bytes: int) -> None:
    """Refuse bounds that are none, and a schedule whose messages do not fit into the mailbox."""
    seen: set[tuple[int, int, str]] = set()
    needed = 0
    for bound in request.bounds:
        check_name(bound.value, "A bounded value")
        item = (bound.direction, bound.source_stage, bound.value)
        _refuse_unless(
            bound.direction in (tensors_pb2.DIRECTION_FORWARD, tensors_pb2.DIRECTION_BACKWARD)
            and bound.source_stage < request.stages
            and item not in seen
            and 1 <= bound.messages <= MAXIMUM_MICRO_BATCHES,
            f"A wrong bound for the messages of {bound.value!r}",
            "FORWARD or BACKWARD of a stage, each once, and a message at least",
            bound,
        )
        seen.add(item)
        needed += bound.messages * bound.message_bytes
    if needed > mailbox_bytes:
        raise LimitExceeded(
            "The schedule puts more on its way to this server than its mailbox holds",
            expected=f"{mailbox_bytes} bytes at most",
            got=f"{needed} bytes",
            remedy="use more, smaller micro-batches or the schedule 1f1b, or raise --mailbox-bytes on the stage server",
        )


def check_memory(request: stage_pb2.PrepareRequest, memory_bytes: int) -> int:
    """Refuse a run whose state alone is above the device's memory; return the bytes of its tensors."""
    replicas = len({peer.replica for peer in request.peers if not peer.parameter_server})
    sharers = replicas if request.shard_optimizer else 1
    state = OptimizerState(request.optimizer)
    exchange = ALONE
    if replicas > 1:
        exchange = ExchangeState(parse_compression(request.compression or "none"), request.HasField("local_steps"))
    specs = (item.spec for item in request.tensors if item.parameter_server in ("", request.server))
    elsewhere = (item.spec for item in request.tensors if item.parameter_server not in ("", request.server))
    held, pushed = state.held(specs, sharers, exchange), state.held(elsewhere, exchange=exchange)
    needed = held.total + pushed.weights + pushed.gradients
    if needed > memory_bytes:
        raise LimitExceeded(
            "The stage does not fit on this server's device",
            expected=f"{memory_bytes / 2**30:.2f} GiB at most",
            got=f"{needed / 2**30:.2f} GiB of weights, gradients and optimizer state, without activations",
            remedy="use more stages, or servers with more memory",
        )
    return held.weights + pushed.weights


def check_entry(
    request: stage_pb2.ExecuteRequest,
    *,
    run: str,
    generation: int,
    number: int | None,
    stages: Mapping[int, Sequence[int]],
    replica: int,
    end: StepEnd,
) -> list[Action]:
    """Check an entry and its program; return the program.

    `number` is the one that must come, None before the first. `stages`: those that have a segment here, by graph.
    end: of a training step here.
    """
    entry = request.entry
    if request.run != run or entry.generation != generation:
        raise StaleGeneration(
            "The entry is for another run or generation",
            expected=f"run {run}, generation {generation}",
            got=f"run {request.run}, generation {entry.generation}",
        )
    _refuse_unless(
        entry.number == number if number is not None else entry.number >= 1,
        "An entry is missing or repeated",
        f"number {1 if number is None else number}",
        entry.number,
    )
    kind = entry.WhichOneof("kind")
    _refuse_unless(kind is not None, "An entry has no kind", "one that this version knows", "none")
    if kind == "load_state":
        _check_optimizer_state(entry.load_state.optimizer_state)
        if entry.load_state.HasField("checkpoint"):
            check_stored(entry.load_state.checkpoint)
    elif kind == "save_state":
        check_save(entry.save_state)
    elif kind == "new_plan":
        check_moves(entry.new_plan)
    program = program_from_proto(request.program)
    if kind not in _GRAPH_OF_ENTRY:
        _refuse_unless(not program, f"An entry of kind {kind} has a program", "none", len(program))
        return program
    micro_batches: Sequence[run_pb2.MicroBatch] = getattr(entry, kind).micro_batches
    indices = [item.index for item in micro_batches]
    _refuse_unless(
        1 <= len(indices) <= MAXIMUM_MICRO_BATCHES
        and indices == list(range(len(indices)))
        and all(item.rows >= 1 for item in micro_batches),
        "Wrong micro-batches",
        f"1 to {MAXIMUM_MICRO_BATCHES}, numbered from 0, each with a row at least",
        f"indices {indices[:20]}, rows {[item.rows for item in micro_batches[:20]]}",
    )
    own = [item.index for item in micro_batches if item.replica == replica]
    active = stages.get(_GRAPH_OF_ENTRY[kind], ())
    check_program(program, active, own, end=end if kind == "train_step" else None)
    return program


def _check_optimizer_state(names: Sequence[run_pb2.OptimizerStateName]) -> None:
    """Refuse repeated and overlong names; which parameters train here is the optimizer's to know."""
    most = MAXIMUM_TENSORS
    _refuse_unless(len(names) <= most, "Too many values of the optimizer's state", f"{most} at most", len(names))
    seen: set[tuple[str, str]] = set()
    for item in names:
        check_name(item.parameter, "A parameter")
        size = len(item.state.encode())
        _refuse_unless(
            1 <= size <= MAXIMUM_STATE_BYTES,
            f"A value of the optimizer's state of {item.parameter!r} has a wrong name",
            f"1 to {MAXIMUM_STATE_BYTES} bytes",
            size,
        )
        name = (item.parameter, item.state)
        _refuse_unless(name not in seen, "A value of the optimizer's state is named twice", "unique names", name)
        seen.add(name)
