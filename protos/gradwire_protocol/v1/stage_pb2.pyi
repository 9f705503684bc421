from gradwire_protocol.v1 import graph_pb2 as _graph_pb2
from gradwire_protocol.v1 import run_pb2 as _run_pb2
from gradwire_protocol.v1 import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WaitKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAIT_KIND_UNSPECIFIED: _ClassVar[WaitKind]
    WAIT_KIND_MESSAGE: _ClassVar[WaitKind]
    WAIT_KIND_ROOM: _ClassVar[WaitKind]
    WAIT_KIND_COLLECT: _ClassVar[WaitKind]
    WAIT_KIND_DISK: _ClassVar[WaitKind]
WAIT_KIND_UNSPECIFIED: WaitKind
WAIT_KIND_MESSAGE: WaitKind
WAIT_KIND_ROOM: WaitKind
WAIT_KIND_COLLECT: WaitKind
WAIT_KIND_DISK: WaitKind

class IncomingValue(_message.Message):
    __slots__ = ("value", "from_batch", "producer_stage", "gradient_to_stage", "gradient_from_stage", "spread_dimension")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    FROM_BATCH_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_STAGE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FROM_STAGE_FIELD_NUMBER: _ClassVar[int]
    SPREAD_DIMENSION_FIELD_NUMBER: _ClassVar[int]
    value: str
    from_batch: bool
    producer_stage: int
    gradient_to_stage: int
    gradient_from_stage: int
    spread_dimension: int
    def __init__(self, value: _Optional[str] = ..., from_batch: bool = ..., producer_stage: _Optional[int] = ..., gradient_to_stage: _Optional[int] = ..., gradient_from_stage: _Optional[int] = ..., spread_dimension: _Optional[int] = ...) -> None: ...

class OutgoingValue(_message.Message):
    __slots__ = ("value", "consumer_stages", "exact", "spread_dimension")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_STAGES_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SPREAD_DIMENSION_FIELD_NUMBER: _ClassVar[int]
    value: str
    consumer_stages: _containers.RepeatedScalarFieldContainer[int]
    exact: bool
    spread_dimension: int
    def __init__(self, value: _Optional[str] = ..., consumer_stages: _Optional[_Iterable[int]] = ..., exact: bool = ..., spread_dimension: _Optional[int] = ...) -> None: ...

class ResultValue(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: str
    def __init__(self, value: _Optional[str] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("stage", "graph", "nodes", "tensors", "incoming", "outgoing", "buffer_updates", "mutated_tensors", "mutated_inputs", "loss", "loss_weight", "results")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    INCOMING_FIELD_NUMBER: _ClassVar[int]
    OUTGOING_FIELD_NUMBER: _ClassVar[int]
    BUFFER_UPDATES_FIELD_NUMBER: _ClassVar[int]
    MUTATED_TENSORS_FIELD_NUMBER: _ClassVar[int]
    MUTATED_INPUTS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOSS_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    graph: _graph_pb2.GraphKind
    nodes: _containers.RepeatedCompositeFieldContainer[_graph_pb2.Node]
    tensors: _containers.RepeatedCompositeFieldContainer[_graph_pb2.TensorUse]
    incoming: _containers.RepeatedCompositeFieldContainer[IncomingValue]
    outgoing: _containers.RepeatedCompositeFieldContainer[OutgoingValue]
    buffer_updates: _containers.RepeatedCompositeFieldContainer[_graph_pb2.BufferUpdate]
    mutated_tensors: _containers.RepeatedScalarFieldContainer[str]
    mutated_inputs: _containers.RepeatedScalarFieldContainer[str]
    loss: str
    loss_weight: str
    results: _containers.RepeatedCompositeFieldContainer[ResultValue]
    def __init__(self, stage: _Optional[int] = ..., graph: _Optional[_Union[_graph_pb2.GraphKind, str]] = ..., nodes: _Optional[_Iterable[_Union[_graph_pb2.Node, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[_graph_pb2.TensorUse, _Mapping]]] = ..., incoming: _Optional[_Iterable[_Union[IncomingValue, _Mapping]]] = ..., outgoing: _Optional[_Iterable[_Union[OutgoingValue, _Mapping]]] = ..., buffer_updates: _Optional[_Iterable[_Union[_graph_pb2.BufferUpdate, _Mapping]]] = ..., mutated_tensors: _Optional[_Iterable[str]] = ..., mutated_inputs: _Optional[_Iterable[str]] = ..., loss: _Optional[str] = ..., loss_weight: _Optional[str] = ..., results: _Optional[_Iterable[_Union[ResultValue, _Mapping]]] = ...) -> None: ...

class TensorPlacement(_message.Message):
    __slots__ = ("spec", "holder_stages", "parameter_server")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    HOLDER_STAGES_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SERVER_FIELD_NUMBER: _ClassVar[int]
    spec: _graph_pb2.TensorSpec
    holder_stages: _containers.RepeatedScalarFieldContainer[int]
    parameter_server: str
    def __init__(self, spec: _Optional[_Union[_graph_pb2.TensorSpec, _Mapping]] = ..., holder_stages: _Optional[_Iterable[int]] = ..., parameter_server: _Optional[str] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("server", "address", "stages", "replica", "parameter_server", "shard")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SERVER_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    server: str
    address: str
    stages: _containers.RepeatedScalarFieldContainer[int]
    replica: int
    parameter_server: bool
    shard: int
    def __init__(self, server: _Optional[str] = ..., address: _Optional[str] = ..., stages: _Optional[_Iterable[int]] = ..., replica: _Optional[int] = ..., parameter_server: bool = ..., shard: _Optional[int] = ...) -> None: ...

class UntakenBound(_message.Message):
    __slots__ = ("direction", "source_stage", "value", "messages", "message_bytes")
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_STAGE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    direction: _tensors_pb2.Direction
    source_stage: int
    value: str
    messages: int
    message_bytes: int
    def __init__(self, direction: _Optional[_Union[_tensors_pb2.Direction, str]] = ..., source_stage: _Optional[int] = ..., value: _Optional[str] = ..., messages: _Optional[int] = ..., message_bytes: _Optional[int] = ...) -> None: ...

class LocalSteps(_message.Message):
    __slots__ = ("learning_rate", "momentum")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    momentum: float
    def __init__(self, learning_rate: _Optional[float] = ..., momentum: _Optional[float] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("run", "generation", "server", "segments", "tensors", "peers", "stages", "optimizer", "loss_form", "seed", "recompute", "precision", "activation_codecs", "bounds", "checksums", "takes_over", "compression", "shard_optimizer", "local_steps", "staleness", "transport")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LOSS_FORM_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CODECS_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    TAKES_OVER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    server: str
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorPlacement]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    stages: int
    optimizer: _run_pb2.Optimizer
    loss_form: _graph_pb2.LossForm
    seed: int
    recompute: bool
    precision: _tensors_pb2.DataType
    activation_codecs: _containers.RepeatedScalarFieldContainer[_tensors_pb2.Codec]
    bounds: _containers.RepeatedCompositeFieldContainer[UntakenBound]
    checksums: bool
    takes_over: bool
    compression: str
    shard_optimizer: bool
    local_steps: LocalSteps
    staleness: int
    transport: str
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., server: _Optional[str] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorPlacement, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., stages: _Optional[int] = ..., optimizer: _Optional[_Union[_run_pb2.Optimizer, _Mapping]] = ..., loss_form: _Optional[_Union[_graph_pb2.LossForm, str]] = ..., seed: _Optional[int] = ..., recompute: bool = ..., precision: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., activation_codecs: _Optional[_Iterable[_Union[_tensors_pb2.Codec, str]]] = ..., bounds: _Optional[_Iterable[_Union[UntakenBound, _Mapping]]] = ..., checksums: bool = ..., takes_over: bool = ..., compression: _Optional[str] = ..., shard_optimizer: bool = ..., local_steps: _Optional[_Union[LocalSteps, _Mapping]] = ..., staleness: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ("state_bytes", "optimizer_state")
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STATE_FIELD_NUMBER: _ClassVar[int]
    state_bytes: int
    optimizer_state: _containers.RepeatedCompositeFieldContainer[_run_pb2.OptimizerStateName]
    def __init__(self, state_bytes: _Optional[int] = ..., optimizer_state: _Optional[_Iterable[_Union[_run_pb2.OptimizerStateName, _Mapping]]] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("run", "entry", "program")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    run: str
    entry: _run_pb2.Entry
    program: _run_pb2.Program
    def __init__(self, run: _Optional[str] = ..., entry: _Optional[_Union[_run_pb2.Entry, _Mapping]] = ..., program: _Optional[_Union[_run_pb2.Program, _Mapping]] = ...) -> None: ...

class ExecuteReply(_message.Message):
    __slots__ = ("report", "saved")
    REPORT_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    report: _run_pb2.EntryReport
    saved: _run_pb2.SavedPart
    def __init__(self, report: _Optional[_Union[_run_pb2.EntryReport, _Mapping]] = ..., saved: _Optional[_Union[_run_pb2.SavedPart, _Mapping]] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("run", "generation", "entry")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    entry: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., entry: _Optional[int] = ...) -> None: ...

class OfferStreamRequest(_message.Message):
    __slots__ = ("run", "generation", "server", "socket", "ticket")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    server: str
    socket: str
    ticket: bytes
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., server: _Optional[str] = ..., socket: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class OfferStreamReply(_message.Message):
    __slots__ = ("accepted", "reason", "explanation")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    explanation: str
    def __init__(self, accepted: bool = ..., reason: _Optional[str] = ..., explanation: _Optional[str] = ...) -> None: ...

class OfferSharedBlockRequest(_message.Message):
    __slots__ = ("run", "generation", "server", "socket", "ticket", "slots", "slot_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    server: str
    socket: str
    ticket: bytes
    slots: int
    slot_bytes: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., server: _Optional[str] = ..., socket: _Optional[str] = ..., ticket: _Optional[bytes] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ...) -> None: ...

class OfferSharedBlockReply(_message.Message):
    __slots__ = ("accepted", "reason", "explanation")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    explanation: str
    def __init__(self, accepted: bool = ..., reason: _Optional[str] = ..., explanation: _Optional[str] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("run", "generation", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    reason: str
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Wait(_message.Message):
    __slots__ = ("kind", "message", "server", "stage")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    kind: WaitKind
    message: _tensors_pb2.MessageKey
    server: str
    stage: int
    def __init__(self, kind: _Optional[_Union[WaitKind, str]] = ..., message: _Optional[_Union[_tensors_pb2.MessageKey, _Mapping]] = ..., server: _Optional[str] = ..., stage: _Optional[int] = ...) -> None: ...

class Unreceipted(_message.Message):
    __slots__ = ("server", "messages", "size_bytes")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    server: str
    messages: int
    size_bytes: int
    def __init__(self, server: _Optional[str] = ..., messages: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Activity(_message.Message):
    __slots__ = ("run", "generation", "stages", "entry", "action", "waiting_for", "waiting_seconds", "progress", "phase", "wait", "client_progress", "parameter_server", "unreceipted")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SERVER_FIELD_NUMBER: _ClassVar[int]
    UNRECEIPTED_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    stages: _containers.RepeatedScalarFieldContainer[int]
    entry: int
    action: str
    waiting_for: str
    waiting_seconds: float
    progress: int
    phase: str
    wait: Wait
    client_progress: int
    parameter_server: bool
    unreceipted: _containers.RepeatedCompositeFieldContainer[Unreceipted]
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., stages: _Optional[_Iterable[int]] = ..., entry: _Optional[int] = ..., action: _Optional[str] = ..., waiting_for: _Optional[str] = ..., waiting_seconds: _Optional[float] = ..., progress: _Optional[int] = ..., phase: _Optional[str] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., client_progress: _Optional[int] = ..., parameter_server: bool = ..., unreceipted: _Optional[_Iterable[_Union[Unreceipted, _Mapping]]] = ...) -> None: ...

class GetActivityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetActivityReply(_message.Message):
    __slots__ = ("activity",)
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    activity: Activity
    def __init__(self, activity: _Optional[_Union[Activity, _Mapping]] = ...) -> None: ...

class MeasureLinksRequest(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class LinkMeasurement(_message.Message):
    __slots__ = ("address", "round_trip_seconds", "sent_bytes_per_second", "received_bytes_per_second")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    address: str
    round_trip_seconds: float
    sent_bytes_per_second: float
    received_bytes_per_second: float
    def __init__(self, address: _Optional[str] = ..., round_trip_seconds: _Optional[float] = ..., sent_bytes_per_second: _Optional[float] = ..., received_bytes_per_second: _Optional[float] = ...) -> None: ...

class MeasureLinksReply(_message.Message):
    __slots__ = ("links",)
    LINKS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[LinkMeasurement]
    def __init__(self, links: _Optional[_Iterable[_Union[LinkMeasurement, _Mapping]]] = ...) -> None: ...

class MeasureCostsRequest(_message.Message):
    __slots__ = ("graph", "tensors", "ends", "rows", "precision", "seconds", "tensor")
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    graph: _graph_pb2.Graph
    tensors: _containers.RepeatedCompositeFieldContainer[_graph_pb2.TensorSpec]
    ends: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    precision: _tensors_pb2.DataType
    seconds: float
    tensor: int
    def __init__(self, graph: _Optional[_Union[_graph_pb2.Graph, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_graph_pb2.TensorSpec, _Mapping]]] = ..., ends: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ..., precision: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., seconds: _Optional[float] = ..., tensor: _Optional[int] = ...) -> None: ...

class GroupCost(_message.Message):
    __slots__ = ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds", "held_bytes", "failure")
    FORWARD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_GRADIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    held_bytes: int
    failure: str
    def __init__(self, forward_seconds: _Optional[float] = ..., input_gradient_seconds: _Optional[float] = ..., weight_gradient_seconds: _Optional[float] = ..., held_bytes: _Optional[int] = ..., failure: _Optional[str] = ...) -> None: ...

class RowsCost(_message.Message):
    __slots__ = ("rows", "groups")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupCost]
    def __init__(self, rows: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupCost, _Mapping]]] = ...) -> None: ...

class ActionCost(_message.Message):
    __slots__ = ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds", "receive_seconds", "send_seconds")
    FORWARD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_GRADIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECEIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SEND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    receive_seconds: float
    send_seconds: float
    def __init__(self, forward_seconds: _Optional[float] = ..., input_gradient_seconds: _Optional[float] = ..., weight_gradient_seconds: _Optional[float] = ..., receive_seconds: _Optional[float] = ..., send_seconds: _Optional[float] = ...) -> None: ...

class MeasureCostsReply(_message.Message):
    __slots__ = ("measured", "seconds", "action")
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    measured: _containers.RepeatedCompositeFieldContainer[RowsCost]
    seconds: float
    action: ActionCost
    def __init__(self, measured: _Optional[_Iterable[_Union[RowsCost, _Mapping]]] = ..., seconds: _Optional[float] = ..., action: _Optional[_Union[ActionCost, _Mapping]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("payload", "reply_bytes")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    reply_bytes: int
    def __init__(self, payload: _Optional[bytes] = ..., reply_bytes: _Optional[int] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...
