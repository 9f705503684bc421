from gradwire_protocol.v1 import run_pb2 as _run_pb2
from gradwire_protocol.v1 import stage_pb2 as _stage_pb2
from gradwire_protocol.v1 import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConfigureRequest(_message.Message):
    __slots__ = ("run", "generation", "tensors", "optimizer", "replicas", "staleness")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    tensors: _containers.RepeatedCompositeFieldContainer[_stage_pb2.TensorPlacement]
    optimizer: _run_pb2.Optimizer
    replicas: _containers.RepeatedScalarFieldContainer[int]
    staleness: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[_stage_pb2.TensorPlacement, _Mapping]]] = ..., optimizer: _Optional[_Union[_run_pb2.Optimizer, _Mapping]] = ..., replicas: _Optional[_Iterable[int]] = ..., staleness: _Optional[int] = ...) -> None: ...

class ConfigureReply(_message.Message):
    __slots__ = ("state_bytes",)
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    state_bytes: int
    def __init__(self, state_bytes: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("run", "generation", "minimum_version")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_VERSION_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    minimum_version: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., minimum_version: _Optional[int] = ...) -> None: ...
