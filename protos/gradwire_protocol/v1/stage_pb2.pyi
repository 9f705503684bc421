from gradwire_protocol.v1 import graph_pb2 as _graph_pb2
from gradwire_protocol.v1 import run_pb2 as _run_pb2
from gradwire_protocol.v1 import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class IncomingValue(_message.Message):
    __slots__ = ("value", "from_batch", "producer_stage", "gradient_to_stage", "gradient_from_stage")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    FROM_BATCH_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_STAGE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_TO_STAGE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FROM_STAGE_FIELD_NUMBER: _ClassVar[int]
    value: str
    from_batch: bool
    producer_stage: int
    gradient_to_stage: int
    gradient_from_stage: int
    def __init__(self, value: _Optional[str] = ..., from_batch: bool = ..., producer_stage: _Optional[int] = ..., gradient_to_stage: _Optional[int] = ..., gradient_from_stage: _Optional[int] = ...) -> None: ...

class OutgoingValue(_message.Message):
    __slots__ = ("value", "consumer_stages")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONSUMER_STAGES_FIELD_NUMBER: _ClassVar[int]
    value: str
    consumer_stages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, value: _Optional[str] = ..., consumer_stages: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("spec", "holder_stages")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    HOLDER_STAGES_FIELD_NUMBER: _ClassVar[int]
    spec: _graph_pb2.TensorSpec
    holder_stages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, spec: _Optional[_Union[_graph_pb2.TensorSpec, _Mapping]] = ..., holder_stages: _Optional[_Iterable[int]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("server", "address", "stages", "replica")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    server: str
    address: str
    stages: _containers.RepeatedScalarFieldContainer[int]
    replica: int
    def __init__(self, server: _Optional[str] = ..., address: _Optional[str] = ..., stages: _Optional[_Iterable[int]] = ..., replica: _Optional[int] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("run", "generation", "server", "segments", "tensors", "peers", "stages", "optimizer", "loss_form", "seed", "recompute", "precision")
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
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., server: _Optional[str] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorPlacement, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., stages: _Optional[int] = ..., optimizer: _Optional[_Union[_run_pb2.Optimizer, _Mapping]] = ..., loss_form: _Optional[_Union[_graph_pb2.LossForm, str]] = ..., seed: _Optional[int] = ..., recompute: bool = ..., precision: _Optional[_Union[_tensors_pb2.DataType, str]] = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ("state_bytes",)
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    state_bytes: int
    def __init__(self, state_bytes: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: _run_pb2.EntryReport
    def __init__(self, report: _Optional[_Union[_run_pb2.EntryReport, _Mapping]] = ...) -> None: ...

class CollectRequest(_message.Message):
    __slots__ = ("run", "generation", "entry")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    entry: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., entry: _Optional[int] = ...) -> None: ...

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

class Activity(_message.Message):
    __slots__ = ("run", "generation", "stages", "entry", "action", "waiting_for", "waiting_seconds", "progress")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    stages: _containers.RepeatedScalarFieldContainer[int]
    entry: int
    action: str
    waiting_for: str
    waiting_seconds: float
    progress: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., stages: _Optional[_Iterable[int]] = ..., entry: _Optional[int] = ..., action: _Optional[str] = ..., waiting_for: _Optional[str] = ..., waiting_seconds: _Optional[float] = ..., progress: _Optional[int] = ...) -> None: ...

class GetActivityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetActivityReply(_message.Message):
    __slots__ = ("activity",)
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    activity: Activity
    def __init__(self, activity: _Optional[_Union[Activity, _Mapping]] = ...) -> None: ...
