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
    __slots__ = ("server", "activity")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    server: str
    activity: _stage_pb2.Activity
    def __init__(self, server: _Optional[str] = ..., activity: _Optional[_Union[_stage_pb2.Activity, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("server", "address", "stages", "replica", "tensors", "inputs", "results", "owned_tensors")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    OWNED_TENSORS_FIELD_NUMBER: _ClassVar[int]
    server: str
    address: str
    stages: _containers.RepeatedScalarFieldContainer[int]
    replica: int
    tensors: _containers.RepeatedScalarFieldContainer[str]
    inputs: _containers.RepeatedCompositeFieldContainer[InputUse]
    results: _containers.RepeatedScalarFieldContainer[str]
    owned_tensors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, server: _Optional[str] = ..., address: _Optional[str] = ..., stages: _Optional[_Iterable[int]] = ..., replica: _Optional[int] = ..., tensors: _Optional[_Iterable[str]] = ..., inputs: _Optional[_Iterable[_Union[InputUse, _Mapping]]] = ..., results: _Optional[_Iterable[str]] = ..., owned_tensors: _Optional[_Iterable[str]] = ...) -> None: ...

class StageSummary(_message.Message):
    __slots__ = ("stage", "first_node", "nodes", "first_module", "last_module", "parameters", "estimated_seconds", "boundary_bytes", "codec", "codec_reason")
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
    def __init__(self, stage: _Optional[int] = ..., first_node: _Optional[int] = ..., nodes: _Optional[int] = ..., first_module: _Optional[str] = ..., last_module: _Optional[str] = ..., parameters: _Optional[int] = ..., estimated_seconds: _Optional[float] = ..., boundary_bytes: _Optional[int] = ..., codec: _Optional[_Union[_tensors_pb2.Codec, str]] = ..., codec_reason: _Optional[str] = ...) -> None: ...

class PlanSummary(_message.Message):
    __slots__ = ("schedule", "extra_warm_up", "micro_batches", "stages", "theoretical_bubble_ratio")
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_WARM_UP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    THEORETICAL_BUBBLE_RATIO_FIELD_NUMBER: _ClassVar[int]
    schedule: str
    extra_warm_up: int
    micro_batches: int
    stages: _containers.RepeatedCompositeFieldContainer[StageSummary]
    theoretical_bubble_ratio: float
    def __init__(self, schedule: _Optional[str] = ..., extra_warm_up: _Optional[int] = ..., micro_batches: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[StageSummary, _Mapping]]] = ..., theoretical_bubble_ratio: _Optional[float] = ...) -> None: ...

class CreateRunReply(_message.Message):
    __slots__ = ("run", "generation", "servers", "plan")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    servers: _containers.RepeatedCompositeFieldContainer[ServerLayout]
    plan: PlanSummary
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., servers: _Optional[_Iterable[_Union[ServerLayout, _Mapping]]] = ..., plan: _Optional[_Union[PlanSummary, _Mapping]] = ...) -> None: ...

class DriveRequest(_message.Message):
    __slots__ = ("run", "entry")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    run: str
    entry: _run_pb2.Entry
    def __init__(self, run: _Optional[str] = ..., entry: _Optional[_Union[_run_pb2.Entry, _Mapping]] = ...) -> None: ...

class DriveReply(_message.Message):
    __slots__ = ("result", "saved")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    result: _run_pb2.EntryResult
    saved: _run_pb2.SaveOutcome
    def __init__(self, result: _Optional[_Union[_run_pb2.EntryResult, _Mapping]] = ..., saved: _Optional[_Union[_run_pb2.SaveOutcome, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("server", "role", "address", "metrics_address", "device", "version", "silent_seconds", "activity")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SILENT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    server: str
    role: ServerRole
    address: str
    metrics_address: str
    device: DeviceInfo
    version: str
    silent_seconds: float
    activity: _stage_pb2.Activity
    def __init__(self, server: _Optional[str] = ..., role: _Optional[_Union[ServerRole, str]] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., device: _Optional[_Union[DeviceInfo, _Mapping]] = ..., version: _Optional[str] = ..., silent_seconds: _Optional[float] = ..., activity: _Optional[_Union[_stage_pb2.Activity, _Mapping]] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run", "state", "generation", "description", "last_entry", "finished_entry", "step", "loss", "reason", "plan", "created_at")
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
    def __init__(self, run: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., generation: _Optional[int] = ..., description: _Optional[str] = ..., last_entry: _Optional[int] = ..., finished_entry: _Optional[int] = ..., step: _Optional[int] = ..., loss: _Optional[float] = ..., reason: _Optional[str] = ..., plan: _Optional[_Union[PlanSummary, _Mapping]] = ..., created_at: _Optional[float] = ...) -> None: ...

class GetStatusReply(_message.Message):
    __slots__ = ("version", "servers", "runs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    version: str
    servers: _containers.RepeatedCompositeFieldContainer[ServerStatus]
    runs: _containers.RepeatedCompositeFieldContainer[RunStatus]
    def __init__(self, version: _Optional[str] = ..., servers: _Optional[_Iterable[_Union[ServerStatus, _Mapping]]] = ..., runs: _Optional[_Iterable[_Union[RunStatus, _Mapping]]] = ...) -> None: ...
