from gradwire_protocol.v1 import graph_pb2 as _graph_pb2
from gradwire_protocol.v1 import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ActionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTION_KIND_UNSPECIFIED: _ClassVar[ActionKind]
    ACTION_KIND_FORWARD: _ClassVar[ActionKind]
    ACTION_KIND_BACKWARD: _ClassVar[ActionKind]
    ACTION_KIND_REDUCE: _ClassVar[ActionKind]
    ACTION_KIND_NORM: _ClassVar[ActionKind]
    ACTION_KIND_UPDATE: _ClassVar[ActionKind]
    ACTION_KIND_INPUT_GRADIENT: _ClassVar[ActionKind]
    ACTION_KIND_WEIGHT_GRADIENT: _ClassVar[ActionKind]
    ACTION_KIND_GATHER: _ClassVar[ActionKind]
    ACTION_KIND_AVERAGE: _ClassVar[ActionKind]
ACTION_KIND_UNSPECIFIED: ActionKind
ACTION_KIND_FORWARD: ActionKind
ACTION_KIND_BACKWARD: ActionKind
ACTION_KIND_REDUCE: ActionKind
ACTION_KIND_NORM: ActionKind
ACTION_KIND_UPDATE: ActionKind
ACTION_KIND_INPUT_GRADIENT: ActionKind
ACTION_KIND_WEIGHT_GRADIENT: ActionKind
ACTION_KIND_GATHER: ActionKind
ACTION_KIND_AVERAGE: ActionKind

class Plan(_message.Message):
    __slots__ = ("stages", "replicas", "tensor", "micro_batches", "schedule", "window", "cuts", "expected_rows", "recompute", "precision", "activation_compression", "stall_seconds", "step_seconds", "checksums", "virtual_stages", "exchange", "compression", "zero", "tensor_plan", "transport")
    STAGES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ROWS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    VIRTUAL_STAGES_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    ZERO_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PLAN_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    stages: int
    replicas: int
    tensor: int
    micro_batches: int
    schedule: str
    window: int
    cuts: _containers.RepeatedScalarFieldContainer[int]
    expected_rows: int
    recompute: bool
    precision: _tensors_pb2.DataType
    activation_compression: _containers.RepeatedScalarFieldContainer[str]
    stall_seconds: float
    step_seconds: float
    checksums: bool
    virtual_stages: int
    exchange: str
    compression: str
    zero: str
    tensor_plan: _containers.RepeatedCompositeFieldContainer[TensorRule]
    transport: str
    def __init__(self, stages: _Optional[int] = ..., replicas: _Optional[int] = ..., tensor: _Optional[int] = ..., micro_batches: _Optional[int] = ..., schedule: _Optional[str] = ..., window: _Optional[int] = ..., cuts: _Optional[_Iterable[int]] = ..., expected_rows: _Optional[int] = ..., recompute: bool = ..., precision: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., activation_compression: _Optional[_Iterable[str]] = ..., stall_seconds: _Optional[float] = ..., step_seconds: _Optional[float] = ..., checksums: bool = ..., virtual_stages: _Optional[int] = ..., exchange: _Optional[str] = ..., compression: _Optional[str] = ..., zero: _Optional[str] = ..., tensor_plan: _Optional[_Iterable[_Union[TensorRule, _Mapping]]] = ..., transport: _Optional[str] = ...) -> None: ...

class TensorRule(_message.Message):
    __slots__ = ("pattern", "split")
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    split: str
    def __init__(self, pattern: _Optional[str] = ..., split: _Optional[str] = ...) -> None: ...

class Action(_message.Message):
    __slots__ = ("kind", "stage", "micro_batch")
    KIND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    kind: ActionKind
    stage: int
    micro_batch: int
    def __init__(self, kind: _Optional[_Union[ActionKind, str]] = ..., stage: _Optional[int] = ..., micro_batch: _Optional[int] = ...) -> None: ...

class Program(_message.Message):
    __slots__ = ("actions",)
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.RepeatedCompositeFieldContainer[Action]
    def __init__(self, actions: _Optional[_Iterable[_Union[Action, _Mapping]]] = ...) -> None: ...

class MicroBatch(_message.Message):
    __slots__ = ("index", "replica", "first_row", "rows")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    index: int
    replica: int
    first_row: int
    rows: int
    def __init__(self, index: _Optional[int] = ..., replica: _Optional[int] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class OptimizerGroup(_message.Message):
    __slots__ = ("parameters", "settings")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    settings: _containers.RepeatedCompositeFieldContainer[_graph_pb2.NamedArgument]
    def __init__(self, parameters: _Optional[_Iterable[str]] = ..., settings: _Optional[_Iterable[_Union[_graph_pb2.NamedArgument, _Mapping]]] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("name", "groups")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    groups: _containers.RepeatedCompositeFieldContainer[OptimizerGroup]
    def __init__(self, name: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[OptimizerGroup, _Mapping]]] = ...) -> None: ...

class Hyperparameters(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[OptimizerGroup]
    def __init__(self, groups: _Optional[_Iterable[_Union[OptimizerGroup, _Mapping]]] = ...) -> None: ...

class OptimizerStateName(_message.Message):
    __slots__ = ("parameter", "state")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    parameter: str
    state: str
    def __init__(self, parameter: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class LoadState(_message.Message):
    __slots__ = ("weights_directory", "optimizer_state", "weight_version", "weights_prefix", "checkpoint")
    WEIGHTS_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_PREFIX_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    weights_directory: str
    optimizer_state: _containers.RepeatedCompositeFieldContainer[OptimizerStateName]
    weight_version: int
    weights_prefix: str
    checkpoint: StoredState
    def __init__(self, weights_directory: _Optional[str] = ..., optimizer_state: _Optional[_Iterable[_Union[OptimizerStateName, _Mapping]]] = ..., weight_version: _Optional[int] = ..., weights_prefix: _Optional[str] = ..., checkpoint: _Optional[_Union[StoredState, _Mapping]] = ...) -> None: ...

class StoredState(_message.Message):
    __slots__ = ("directory", "manifest_sha256", "keys", "kept")
    class KeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    directory: str
    manifest_sha256: str
    keys: _containers.ScalarMap[str, str]
    kept: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, directory: _Optional[str] = ..., manifest_sha256: _Optional[str] = ..., keys: _Optional[_Mapping[str, str]] = ..., kept: _Optional[_Iterable[str]] = ...) -> None: ...

class TrainStep(_message.Message):
    __slots__ = ("step", "micro_batches", "hyperparameters", "max_gradient_norm", "return_gradients")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MAX_GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    RETURN_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro_batches: _containers.RepeatedCompositeFieldContainer[MicroBatch]
    hyperparameters: Hyperparameters
    max_gradient_norm: float
    return_gradients: bool
    def __init__(self, step: _Optional[int] = ..., micro_batches: _Optional[_Iterable[_Union[MicroBatch, _Mapping]]] = ..., hyperparameters: _Optional[_Union[Hyperparameters, _Mapping]] = ..., max_gradient_norm: _Optional[float] = ..., return_gradients: bool = ...) -> None: ...

class Evaluate(_message.Message):
    __slots__ = ("micro_batches",)
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    micro_batches: _containers.RepeatedCompositeFieldContainer[MicroBatch]
    def __init__(self, micro_batches: _Optional[_Iterable[_Union[MicroBatch, _Mapping]]] = ...) -> None: ...

class Predict(_message.Message):
    __slots__ = ("micro_batches",)
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    micro_batches: _containers.RepeatedCompositeFieldContainer[MicroBatch]
    def __init__(self, micro_batches: _Optional[_Iterable[_Union[MicroBatch, _Mapping]]] = ...) -> None: ...

class FetchState(_message.Message):
    __slots__ = ("optimizer_state",)
    OPTIMIZER_STATE_FIELD_NUMBER: _ClassVar[int]
    optimizer_state: bool
    def __init__(self, optimizer_state: bool = ...) -> None: ...

class SaveState(_message.Message):
    __slots__ = ("directory", "token", "keys", "kept", "tied")
    class KeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class TiedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    TIED_FIELD_NUMBER: _ClassVar[int]
    directory: str
    token: str
    keys: _containers.ScalarMap[str, str]
    kept: _containers.RepeatedScalarFieldContainer[str]
    tied: _containers.ScalarMap[str, str]
    def __init__(self, directory: _Optional[str] = ..., token: _Optional[str] = ..., keys: _Optional[_Mapping[str, str]] = ..., kept: _Optional[_Iterable[str]] = ..., tied: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("tensor", "from_server", "to_server", "states")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    FROM_SERVER_FIELD_NUMBER: _ClassVar[int]
    TO_SERVER_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    from_server: str
    to_server: str
    states: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tensor: _Optional[str] = ..., from_server: _Optional[str] = ..., to_server: _Optional[str] = ..., states: _Optional[_Iterable[str]] = ...) -> None: ...

class NewPlan(_message.Message):
    __slots__ = ("servers", "cuts", "placement", "schedule", "extra_warm_up", "moves", "reloads")
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_WARM_UP_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    RELOADS_FIELD_NUMBER: _ClassVar[int]
    servers: _containers.RepeatedScalarFieldContainer[str]
    cuts: _containers.RepeatedScalarFieldContainer[int]
    placement: _containers.RepeatedScalarFieldContainer[int]
    schedule: str
    extra_warm_up: int
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    reloads: bool
    def __init__(self, servers: _Optional[_Iterable[str]] = ..., cuts: _Optional[_Iterable[int]] = ..., placement: _Optional[_Iterable[int]] = ..., schedule: _Optional[str] = ..., extra_warm_up: _Optional[int] = ..., moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ..., reloads: bool = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("number", "generation", "load_state", "train_step", "evaluate", "predict", "fetch_state", "save_state", "new_plan")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    TRAIN_STEP_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    PREDICT_FIELD_NUMBER: _ClassVar[int]
    FETCH_STATE_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATE_FIELD_NUMBER: _ClassVar[int]
    NEW_PLAN_FIELD_NUMBER: _ClassVar[int]
    number: int
    generation: int
    load_state: LoadState
    train_step: TrainStep
    evaluate: Evaluate
    predict: Predict
    fetch_state: FetchState
    save_state: SaveState
    new_plan: NewPlan
    def __init__(self, number: _Optional[int] = ..., generation: _Optional[int] = ..., load_state: _Optional[_Union[LoadState, _Mapping]] = ..., train_step: _Optional[_Union[TrainStep, _Mapping]] = ..., evaluate: _Optional[_Union[Evaluate, _Mapping]] = ..., predict: _Optional[_Union[Predict, _Mapping]] = ..., fetch_state: _Optional[_Union[FetchState, _Mapping]] = ..., save_state: _Optional[_Union[SaveState, _Mapping]] = ..., new_plan: _Optional[_Union[NewPlan, _Mapping]] = ...) -> None: ...

class LossPart(_message.Message):
    __slots__ = ("micro_batch", "sum", "weight")
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    micro_batch: int
    sum: float
    weight: float
    def __init__(self, micro_batch: _Optional[int] = ..., sum: _Optional[float] = ..., weight: _Optional[float] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("window_seconds", "busy_seconds", "idle_seconds")
    class BusySecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class IdleSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    WINDOW_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    window_seconds: float
    busy_seconds: _containers.ScalarMap[str, float]
    idle_seconds: _containers.ScalarMap[str, float]
    def __init__(self, window_seconds: _Optional[float] = ..., busy_seconds: _Optional[_Mapping[str, float]] = ..., idle_seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SavedFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class EntryReport(_message.Message):
    __slots__ = ("entry", "generation", "losses", "timing", "weight_version", "gradient_norm")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    entry: int
    generation: int
    losses: _containers.RepeatedCompositeFieldContainer[LossPart]
    timing: Timing
    weight_version: int
    gradient_norm: float
    def __init__(self, entry: _Optional[int] = ..., generation: _Optional[int] = ..., losses: _Optional[_Iterable[_Union[LossPart, _Mapping]]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., weight_version: _Optional[int] = ..., gradient_norm: _Optional[float] = ...) -> None: ...

class OptimizerNumber(_message.Message):
    __slots__ = ("parameter", "state", "boolean", "integer", "real")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    parameter: str
    state: str
    boolean: bool
    integer: int
    real: float
    def __init__(self, parameter: _Optional[str] = ..., state: _Optional[str] = ..., boolean: bool = ..., integer: _Optional[int] = ..., real: _Optional[float] = ...) -> None: ...

class SaveFailure(_message.Message):
    __slots__ = ("message", "expected", "got", "remedy")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    GOT_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    message: str
    expected: str
    got: str
    remedy: str
    def __init__(self, message: _Optional[str] = ..., expected: _Optional[str] = ..., got: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class SavedPart(_message.Message):
    __slots__ = ("entry", "generation", "files", "numbers", "weight_version", "failure")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    entry: int
    generation: int
    files: _containers.RepeatedCompositeFieldContainer[SavedFile]
    numbers: _containers.RepeatedCompositeFieldContainer[OptimizerNumber]
    weight_version: int
    failure: SaveFailure
    def __init__(self, entry: _Optional[int] = ..., generation: _Optional[int] = ..., files: _Optional[_Iterable[_Union[SavedFile, _Mapping]]] = ..., numbers: _Optional[_Iterable[_Union[OptimizerNumber, _Mapping]]] = ..., weight_version: _Optional[int] = ..., failure: _Optional[_Union[SaveFailure, _Mapping]] = ...) -> None: ...

class SaveOutcome(_message.Message):
    __slots__ = ("entry", "failure")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    entry: int
    failure: SaveFailure
    def __init__(self, entry: _Optional[int] = ..., failure: _Optional[_Union[SaveFailure, _Mapping]] = ...) -> None: ...

class EntryResult(_message.Message):
    __slots__ = ("entry", "loss", "weight", "seconds", "gradient_norm", "weight_version", "timings")
    class TimingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Timing
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Timing, _Mapping]] = ...) -> None: ...
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    entry: int
    loss: float
    weight: float
    seconds: float
    gradient_norm: float
    weight_version: int
    timings: _containers.MessageMap[str, Timing]
    def __init__(self, entry: _Optional[int] = ..., loss: _Optional[float] = ..., weight: _Optional[float] = ..., seconds: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., weight_version: _Optional[int] = ..., timings: _Optional[_Mapping[str, Timing]] = ...) -> None: ...
