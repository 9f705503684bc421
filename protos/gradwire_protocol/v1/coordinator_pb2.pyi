from gradwire_protocol.v1 import graph_pb2 as _graph_pb2
from gradwire_protocol.v1 import run_pb2 as _run_pb2
from gradwire_protocol.v1 import stage_pb2 as _stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_ROLE_UNSPECIFIED: _ClassVar[ServerRole]
    SERVER_ROLE_STAGE: _ClassVar[ServerRole]
    SERVER_ROLE_PARAMETER: _ClassVar[ServerRole]

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_PREPARED: _ClassVar[RunState]
    RUN_STATE_ACTIVE: _ClassVar[RunState]
    RUN_STATE_ENDED: _ClassVar[RunState]
    RUN_STATE_FAILED: _ClassVar[RunState]
SERVER_ROLE_UNSPECIFIED: ServerRole
SERVER_ROLE_STAGE: ServerRole
SERVER_ROLE_PARAMETER: ServerRole
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_PREPARED: RunState
RUN_STATE_ACTIVE: RunState
RUN_STATE_ENDED: RunState
RUN_STATE_FAILED: RunState

class DeviceInfo(_message.Message):
    __slots__ = ("kind", "name", "memory_bytes", "threads", "flops_per_second", "bytes_per_second")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    FLOPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    memory_bytes: int
    threads: int
    flops_per_second: float
    bytes_per_second: float
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., threads: _Optional[int] = ..., flops_per_second: _Optional[float] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("server", "role", "address", "metrics_address", "device", "version", "operators")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    server: str
    role: ServerRole
    address: str
    metrics_address: str
    device: DeviceInfo
    version: str
    operators: _containers.RepeatedCompositeFieldContainer[_graph_pb2.CustomOperator]
    def __init__(self, server: _Optional[str] = ..., role: _Optional[_Union[ServerRole, str]] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., device: _Optional[_Union[DeviceInfo, _Mapping]] = ..., version: _Optional[str] = ..., operators: _Optional[_Iterable[_Union[_graph_pb2.CustomOperator, _Mapping]]] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("lease_seconds", "heartbeat_seconds")
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    lease_seconds: float
    heartbeat_seconds: float
    def __init__(self, lease_seconds: _Optional[float] = ..., heartbeat_seconds: _Optional[float] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("server", "activity", "leaves_in_seconds")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    LEAVES_IN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    server: str
    activity: _stage_pb2.Activity
    leaves_in_seconds: float
    def __init__(self, server: _Optional[str] = ..., activity: _Optional[_Union[_stage_pb2.Activity, _Mapping]] = ..., leaves_in_seconds: _Optional[float] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: str
    def __init__(self, server: _Optional[str] = ...) -> None: ...

class DeregisterReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateRunRequest(_message.Message):
    __slots__ = ("model", "plan", "optimizer", "seed", "description")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    model: _graph_pb2.Model
    plan: _run_pb2.Plan
    optimizer: _run_pb2.Optimizer
    seed: int
    description: str
    def __init__(self, model: _Optional[_Union[_graph_pb2.Model, _Mapping]] = ..., plan: _Optional[_Union[_run_pb2.Plan, _Mapping]] = ..., optimizer: _Optional[_Union[_run_pb2.Optimizer, _Mapping]] = ..., seed: _Optional[int] = ..., description: _Optional[str] = ...) -> None: ...

class InputUse(_message.Message):
    __slots__ = ("graph", "values")
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    graph: _graph_pb2.GraphKind
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, graph: _Optional[_Union[_graph_pb2.GraphKind, str]] = ..., values: _Optional[_Iterable[str]] = ...) -> None: ...

class ServerLayout(_message.Message):
    __slots__ = ("server", "address", "stages", "replica", "tensors", "inputs", "results", "owned_tensors", "parameter_server", "shard")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    OWNED_TENSORS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SERVER_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    server: str
    address: str
    stages: _containers.RepeatedScalarFieldContainer[int]
    replica: int
    tensors: _containers.RepeatedScalarFieldContainer[str]
    inputs: _containers.RepeatedCompositeFieldContainer[InputUse]
    results: _containers.RepeatedScalarFieldContainer[str]
    owned_tensors: _containers.RepeatedScalarFieldContainer[str]
    parameter_server: bool
    shard: int
    def __init__(self, server: _Optional[str] = ..., address: _Optional[str] = ..., stages: _Optional[_Iterable[int]] = ..., replica: _Optional[int] = ..., tensors: _Optional[_Iterable[str]] = ..., inputs: _Optional[_Iterable[_Union[InputUse, _Mapping]]] = ..., results: _Optional[_Iterable[str]] = ..., owned_tensors: _Optional[_Iterable[str]] = ..., parameter_server: bool = ..., shard: _Optional[int] = ...) -> None: ...

class StageSummary(_message.Message):
    __slots__ = ("stage", "first_node", "nodes", "first_module", "last_module", "parameters", "estimated_seconds", "boundary_bytes", "codec", "codec_reason", "server", "forward_seconds", "backward_seconds", "input_gradient_seconds", "weight_gradient_seconds", "returned_bytes")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FIRST_NODE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    FIRST_MODULE_FIELD_NUMBER: _ClassVar[int]
    LAST_MODULE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_REASON_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    FORWARD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_GRADIENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RETURNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    stage: int
    first_node: int
    nodes: int
    first_module: str
    last_module: str
    parameters: int
    estimated_seconds: float
    boundary_bytes: int
    codec: _tensors_pb2.Codec
    codec_reason: str
    server: int
    forward_seconds: float
    backward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    returned_bytes: int
    def __init__(self, stage: _Optional[int] = ..., first_node: _Optional[int] = ..., nodes: _Optional[int] = ..., first_module: _Optional[str] = ..., last_module: _Optional[str] = ..., parameters: _Optional[int] = ..., estimated_seconds: _Optional[float] = ..., boundary_bytes: _Optional[int] = ..., codec: _Optional[_Union[_tensors_pb2.Codec, str]] = ..., codec_reason: _Optional[str] = ..., server: _Optional[int] = ..., forward_seconds: _Optional[float] = ..., backward_seconds: _Optional[float] = ..., input_gradient_seconds: _Optional[float] = ..., weight_gradient_seconds: _Optional[float] = ..., returned_bytes: _Optional[int] = ...) -> None: ...

class ServerPrediction(_message.Message):
    __slots__ = ("server", "device", "stages", "busy_seconds", "reduce_seconds", "update_seconds", "weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "replica", "shard")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REDUCE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    server: str
    device: DeviceInfo
    stages: _containers.RepeatedScalarFieldContainer[int]
    busy_seconds: float
    reduce_seconds: float
    update_seconds: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    replica: int
    shard: int
    def __init__(self, server: _Optional[str] = ..., device: _Optional[_Union[DeviceInfo, _Mapping]] = ..., stages: _Optional[_Iterable[int]] = ..., busy_seconds: _Optional[float] = ..., reduce_seconds: _Optional[float] = ..., update_seconds: _Optional[float] = ..., weight_bytes: _Optional[int] = ..., gradient_bytes: _Optional[int] = ..., optimizer_bytes: _Optional[int] = ..., activation_bytes: _Optional[int] = ..., replica: _Optional[int] = ..., shard: _Optional[int] = ...) -> None: ...

class LinkPrediction(_message.Message):
    __slots__ = ("stage", "forward_bytes_per_second", "backward_bytes_per_second", "round_trip_seconds", "measured", "reason")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEASURED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    stage: int
    forward_bytes_per_second: float
    backward_bytes_per_second: float
    round_trip_seconds: float
    measured: bool
    reason: str
    def __init__(self, stage: _Optional[int] = ..., forward_bytes_per_second: _Optional[float] = ..., backward_bytes_per_second: _Optional[float] = ..., round_trip_seconds: _Optional[float] = ..., measured: bool = ..., reason: _Optional[str] = ...) -> None: ...

class PlanCandidate(_message.Message):
    __slots__ = ("schedule", "extra_warm_up", "virtual_stages", "placement", "seconds", "bubble_ratio", "peak_bytes", "traffic_bytes", "fits", "chosen", "split_backwards")
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_WARM_UP_FIELD_NUMBER: _ClassVar[int]
    VIRTUAL_STAGES_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BUBBLE_RATIO_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_BYTES_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    SPLIT_BACKWARDS_FIELD_NUMBER: _ClassVar[int]
    schedule: str
    extra_warm_up: int
    virtual_stages: int
    placement: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    bubble_ratio: float
    peak_bytes: _containers.RepeatedScalarFieldContainer[int]
    traffic_bytes: int
    fits: bool
    chosen: bool
    split_backwards: int
    def __init__(self, schedule: _Optional[str] = ..., extra_warm_up: _Optional[int] = ..., virtual_stages: _Optional[int] = ..., placement: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ..., bubble_ratio: _Optional[float] = ..., peak_bytes: _Optional[_Iterable[int]] = ..., traffic_bytes: _Optional[int] = ..., fits: bool = ..., chosen: bool = ..., split_backwards: _Optional[int] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("seconds", "bubble_ratio", "lower_bound_seconds", "servers", "links", "candidates", "reason", "cost_source", "partition_gap")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BUBBLE_RATIO_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COST_SOURCE_FIELD_NUMBER: _ClassVar[int]
    PARTITION_GAP_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    bubble_ratio: float
    lower_bound_seconds: float
    servers: _containers.RepeatedCompositeFieldContainer[ServerPrediction]
    links: _containers.RepeatedCompositeFieldContainer[LinkPrediction]
    candidates: _containers.RepeatedCompositeFieldContainer[PlanCandidate]
    reason: str
    cost_source: str
    partition_gap: float
    def __init__(self, seconds: _Optional[float] = ..., bubble_ratio: _Optional[float] = ..., lower_bound_seconds: _Optional[float] = ..., servers: _Optional[_Iterable[_Union[ServerPrediction, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[LinkPrediction, _Mapping]]] = ..., candidates: _Optional[_Iterable[_Union[PlanCandidate, _Mapping]]] = ..., reason: _Optional[str] = ..., cost_source: _Optional[str] = ..., partition_gap: _Optional[float] = ...) -> None: ...

class TimedAction(_message.Message):
    __slots__ = ("action", "start_seconds", "end_seconds")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    START_SECONDS_FIELD_NUMBER: _ClassVar[int]
    END_SECONDS_FIELD_NUMBER: _ClassVar[int]
    action: _run_pb2.Action
    start_seconds: float
    end_seconds: float
    def __init__(self, action: _Optional[_Union[_run_pb2.Action, _Mapping]] = ..., start_seconds: _Optional[float] = ..., end_seconds: _Optional[float] = ...) -> None: ...

class ServerTimeline(_message.Message):
    __slots__ = ("actions",)
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.RepeatedCompositeFieldContainer[TimedAction]
    def __init__(self, actions: _Optional[_Iterable[_Union[TimedAction, _Mapping]]] = ...) -> None: ...

class PlanSummary(_message.Message):
    __slots__ = ("schedule", "extra_warm_up", "micro_batches", "stages", "theoretical_bubble_ratio", "virtual_stages", "replica_shares", "compression", "shards_optimizer", "zero_reason", "exchange", "compression_reason", "prediction", "tensor", "transport", "transport_reason")
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_WARM_UP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    THEORETICAL_BUBBLE_RATIO_FIELD_NUMBER: _ClassVar[int]
    VIRTUAL_STAGES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_SHARES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    SHARDS_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    ZERO_REASON_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_REASON_FIELD_NUMBER: _ClassVar[int]
    schedule: str
    extra_warm_up: int
    micro_batches: int
    stages: _containers.RepeatedCompositeFieldContainer[StageSummary]
    theoretical_bubble_ratio: float
    virtual_stages: int
    replica_shares: _containers.RepeatedScalarFieldContainer[float]
    compression: str
    shards_optimizer: bool
    zero_reason: str
    exchange: str
    compression_reason: str
    prediction: Prediction
    tensor: TensorSummary
    transport: str
    transport_reason: str
    def __init__(self, schedule: _Optional[str] = ..., extra_warm_up: _Optional[int] = ..., micro_batches: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[StageSummary, _Mapping]]] = ..., theoretical_bubble_ratio: _Optional[float] = ..., virtual_stages: _Optional[int] = ..., replica_shares: _Optional[_Iterable[float]] = ..., compression: _Optional[str] = ..., shards_optimizer: bool = ..., zero_reason: _Optional[str] = ..., exchange: _Optional[str] = ..., compression_reason: _Optional[str] = ..., prediction: _Optional[_Union[Prediction, _Mapping]] = ..., tensor: _Optional[_Union[TensorSummary, _Mapping]] = ..., transport: _Optional[str] = ..., transport_reason: _Optional[str] = ...) -> None: ...

class SplitParameter(_message.Message):
    __slots__ = ("name", "split")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    split: str
    def __init__(self, name: _Optional[str] = ..., split: _Optional[str] = ...) -> None: ...

class TensorSummary(_message.Message):
    __slots__ = ("servers", "parameters", "forward_exchanges", "backward_exchanges", "exchange_bytes")
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    servers: int
    parameters: _containers.RepeatedCompositeFieldContainer[SplitParameter]
    forward_exchanges: int
    backward_exchanges: int
    exchange_bytes: int
    def __init__(self, servers: _Optional[int] = ..., parameters: _Optional[_Iterable[_Union[SplitParameter, _Mapping]]] = ..., forward_exchanges: _Optional[int] = ..., backward_exchanges: _Optional[int] = ..., exchange_bytes: _Optional[int] = ...) -> None: ...

class CreateRunReply(_message.Message):
    __slots__ = ("run", "generation", "servers", "plan", "timeline")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    servers: _containers.RepeatedCompositeFieldContainer[ServerLayout]
    plan: PlanSummary
    timeline: _containers.RepeatedCompositeFieldContainer[ServerTimeline]
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., servers: _Optional[_Iterable[_Union[ServerLayout, _Mapping]]] = ..., plan: _Optional[_Union[PlanSummary, _Mapping]] = ..., timeline: _Optional[_Iterable[_Union[ServerTimeline, _Mapping]]] = ...) -> None: ...

class PlanReply(_message.Message):
    __slots__ = ("plan", "timeline")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    plan: PlanSummary
    timeline: _containers.RepeatedCompositeFieldContainer[ServerTimeline]
    def __init__(self, plan: _Optional[_Union[PlanSummary, _Mapping]] = ..., timeline: _Optional[_Iterable[_Union[ServerTimeline, _Mapping]]] = ...) -> None: ...

class DriveRequest(_message.Message):
    __slots__ = ("run", "entry")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    run: str
    entry: _run_pb2.Entry
    def __init__(self, run: _Optional[str] = ..., entry: _Optional[_Union[_run_pb2.Entry, _Mapping]] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("reason", "seconds")
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    seconds: float
    def __init__(self, reason: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class DriveReply(_message.Message):
    __slots__ = ("result", "saved", "stop")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    result: _run_pb2.EntryResult
    saved: _run_pb2.SaveOutcome
    stop: StopRequest
    def __init__(self, result: _Optional[_Union[_run_pb2.EntryResult, _Mapping]] = ..., saved: _Optional[_Union[_run_pb2.SaveOutcome, _Mapping]] = ..., stop: _Optional[_Union[StopRequest, _Mapping]] = ...) -> None: ...

class BeginSaveRequest(_message.Message):
    __slots__ = ("run", "directory", "manifest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    directory: str
    manifest: str
    def __init__(self, run: _Optional[str] = ..., directory: _Optional[str] = ..., manifest: _Optional[str] = ...) -> None: ...

class BeginSaveReply(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: str
    def __init__(self, token: _Optional[str] = ...) -> None: ...

class InspectCheckpointRequest(_message.Message):
    __slots__ = ("directory",)
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    directory: str
    def __init__(self, directory: _Optional[str] = ...) -> None: ...

class CheckpointTensor(_message.Message):
    __slots__ = ("name", "data_type", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    data_type: _tensors_pb2.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., data_type: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class InspectCheckpointReply(_message.Message):
    __slots__ = ("manifest", "manifest_sha256", "model", "optimizer")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    manifest_sha256: str
    model: _containers.RepeatedCompositeFieldContainer[CheckpointTensor]
    optimizer: _containers.RepeatedCompositeFieldContainer[CheckpointTensor]
    def __init__(self, manifest: _Optional[str] = ..., manifest_sha256: _Optional[str] = ..., model: _Optional[_Iterable[_Union[CheckpointTensor, _Mapping]]] = ..., optimizer: _Optional[_Iterable[_Union[CheckpointTensor, _Mapping]]] = ...) -> None: ...

class ReplanRequest(_message.Message):
    __slots__ = ("run", "minimum_gain", "reloads")
    RUN_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_GAIN_FIELD_NUMBER: _ClassVar[int]
    RELOADS_FIELD_NUMBER: _ClassVar[int]
    run: str
    minimum_gain: float
    reloads: bool
    def __init__(self, run: _Optional[str] = ..., minimum_gain: _Optional[float] = ..., reloads: bool = ...) -> None: ...

class ReplanReply(_message.Message):
    __slots__ = ("moved", "seconds_before", "seconds_after", "layout", "new_plan", "needs_reload")
    MOVED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_AFTER_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NEW_PLAN_FIELD_NUMBER: _ClassVar[int]
    NEEDS_RELOAD_FIELD_NUMBER: _ClassVar[int]
    moved: bool
    seconds_before: float
    seconds_after: float
    layout: CreateRunReply
    new_plan: _run_pb2.NewPlan
    needs_reload: bool
    def __init__(self, moved: bool = ..., seconds_before: _Optional[float] = ..., seconds_after: _Optional[float] = ..., layout: _Optional[_Union[CreateRunReply, _Mapping]] = ..., new_plan: _Optional[_Union[_run_pb2.NewPlan, _Mapping]] = ..., needs_reload: bool = ...) -> None: ...

class EndRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class EndRunReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerStatus(_message.Message):
    __slots__ = ("server", "role", "address", "metrics_address", "device", "version", "silent_seconds", "activity", "leaving")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SILENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    server: str
    role: ServerRole
    address: str
    metrics_address: str
    device: DeviceInfo
    version: str
    silent_seconds: float
    activity: _stage_pb2.Activity
    leaving: bool
    def __init__(self, server: _Optional[str] = ..., role: _Optional[_Union[ServerRole, str]] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., device: _Optional[_Union[DeviceInfo, _Mapping]] = ..., version: _Optional[str] = ..., silent_seconds: _Optional[float] = ..., activity: _Optional[_Union[_stage_pb2.Activity, _Mapping]] = ..., leaving: bool = ...) -> None: ...

class StoredCheckpoint(_message.Message):
    __slots__ = ("directory", "step", "written_at")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_AT_FIELD_NUMBER: _ClassVar[int]
    directory: str
    step: int
    written_at: float
    def __init__(self, directory: _Optional[str] = ..., step: _Optional[int] = ..., written_at: _Optional[float] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run", "state", "generation", "description", "last_entry", "finished_entry", "step", "loss", "reason", "plan", "created_at", "checkpoint")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LAST_ENTRY_FIELD_NUMBER: _ClassVar[int]
    FINISHED_ENTRY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    run: str
    state: RunState
    generation: int
    description: str
    last_entry: int
    finished_entry: int
    step: int
    loss: float
    reason: str
    plan: PlanSummary
    created_at: float
    checkpoint: StoredCheckpoint
    def __init__(self, run: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., generation: _Optional[int] = ..., description: _Optional[str] = ..., last_entry: _Optional[int] = ..., finished_entry: _Optional[int] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ..., reason: _Optional[str] = ..., plan: _Optional[_Union[PlanSummary, _Mapping]] = ..., created_at: _Optional[float] = ..., checkpoint: _Optional[_Union[StoredCheckpoint, _Mapping]] = ...) -> None: ...

class GetStatusReply(_message.Message):
    __slots__ = ("version", "servers", "runs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    version: str
    servers: _containers.RepeatedCompositeFieldContainer[ServerStatus]
    runs: _containers.RepeatedCompositeFieldContainer[RunStatus]
    def __init__(self, version: _Optional[str] = ..., servers: _Optional[_Iterable[_Union[ServerStatus, _Mapping]]] = ..., runs: _Optional[_Iterable[_Union[RunStatus, _Mapping]]] = ...) -> None: ...
