from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_INT64: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]
    DATA_TYPE_INT16: _ClassVar[DataType]
    DATA_TYPE_INT8: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_BOOL: _ClassVar[DataType]
    DATA_TYPE_COMPLEX64: _ClassVar[DataType]
    DATA_TYPE_COMPLEX128: _ClassVar[DataType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_NONE: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTION_UNSPECIFIED: _ClassVar[Direction]
    DIRECTION_BATCH: _ClassVar[Direction]
    DIRECTION_FORWARD: _ClassVar[Direction]
    DIRECTION_BACKWARD: _ClassVar[Direction]
    DIRECTION_STATE: _ClassVar[Direction]
    DIRECTION_TIED: _ClassVar[Direction]
    DIRECTION_NORM: _ClassVar[Direction]
    DIRECTION_WEIGHT: _ClassVar[Direction]
    DIRECTION_RESULT: _ClassVar[Direction]
    DIRECTION_MOVED: _ClassVar[Direction]
    DIRECTION_REDUCE: _ClassVar[Direction]
    DIRECTION_WEIGHTS: _ClassVar[Direction]
    DIRECTION_GROUP: _ClassVar[Direction]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT64: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_INT64: DataType
DATA_TYPE_INT32: DataType
DATA_TYPE_INT16: DataType
DATA_TYPE_INT8: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_BOOL: DataType
DATA_TYPE_COMPLEX64: DataType
DATA_TYPE_COMPLEX128: DataType
CODEC_UNSPECIFIED: Codec
CODEC_NONE: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
DIRECTION_UNSPECIFIED: Direction
DIRECTION_BATCH: Direction
DIRECTION_FORWARD: Direction
DIRECTION_BACKWARD: Direction
DIRECTION_STATE: Direction
DIRECTION_TIED: Direction
DIRECTION_NORM: Direction
DIRECTION_WEIGHT: Direction
DIRECTION_RESULT: Direction
DIRECTION_MOVED: Direction
DIRECTION_REDUCE: Direction
DIRECTION_WEIGHTS: Direction
DIRECTION_GROUP: Direction

class MessageKey(_message.Message):
    __slots__ = ("run", "generation", "entry", "micro_batch", "value", "direction", "source_stage", "state", "source_member")
    RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_STAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_MEMBER_FIELD_NUMBER: _ClassVar[int]
    run: str
    generation: int
    entry: int
    micro_batch: int
    value: str
    direction: Direction
    source_stage: int
    state: str
    source_member: int
    def __init__(self, run: _Optional[str] = ..., generation: _Optional[int] = ..., entry: _Optional[int] = ..., micro_batch: _Optional[int] = ..., value: _Optional[str] = ..., direction: _Optional[_Union[Direction, str]] = ..., source_stage: _Optional[int] = ..., state: _Optional[str] = ..., source_member: _Optional[int] = ...) -> None: ...

class SharedSlot(_message.Message):
    __slots__ = ("block", "slot", "use")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    block: bytes
    slot: int
    use: int
    def __init__(self, block: _Optional[bytes] = ..., slot: _Optional[int] = ..., use: _Optional[int] = ...) -> None: ...

class TensorInfo(_message.Message):
    __slots__ = ("data_type", "shape", "strides", "size_bytes", "codec", "requires_grad", "shared")
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STRIDES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_GRAD_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    strides: _containers.RepeatedScalarFieldContainer[int]
    size_bytes: int
    codec: Codec
    requires_grad: bool
    shared: SharedSlot
    def __init__(self, data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., strides: _Optional[_Iterable[int]] = ..., size_bytes: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., requires_grad: bool = ..., shared: _Optional[_Union[SharedSlot, _Mapping]] = ...) -> None: ...

class Absent(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("key", "sequence", "tensor", "integer", "real", "boolean", "absent")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    key: MessageKey
    sequence: int
    tensor: TensorInfo
    integer: int
    real: float
    boolean: bool
    absent: Absent
    def __init__(self, key: _Optional[_Union[MessageKey, _Mapping]] = ..., sequence: _Optional[int] = ..., tensor: _Optional[_Union[TensorInfo, _Mapping]] = ..., integer: _Optional[int] = ..., real: _Optional[float] = ..., boolean: bool = ..., absent: _Optional[_Union[Absent, _Mapping]] = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("offset", "padding", "data", "checksum")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    offset: int
    padding: bytes
    data: bytes
    checksum: int
    def __init__(self, offset: _Optional[int] = ..., padding: _Optional[bytes] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class TensorFrame(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: TensorHeader
    chunk: TensorChunk
    def __init__(self, header: _Optional[_Union[TensorHeader, _Mapping]] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...
