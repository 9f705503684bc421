from gradwire_protocol.v1 import tensors_pb2 as _tensors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GraphKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRAPH_KIND_UNSPECIFIED: _ClassVar[GraphKind]
    GRAPH_KIND_TRAIN: _ClassVar[GraphKind]
    GRAPH_KIND_EVALUATE: _ClassVar[GraphKind]
    GRAPH_KIND_PREDICT: _ClassVar[GraphKind]

class ValueKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VALUE_KIND_UNSPECIFIED: _ClassVar[ValueKind]
    VALUE_KIND_TENSOR: _ClassVar[ValueKind]
    VALUE_KIND_INTEGER: _ClassVar[ValueKind]
    VALUE_KIND_REAL: _ClassVar[ValueKind]
    VALUE_KIND_BOOLEAN: _ClassVar[ValueKind]
    VALUE_KIND_TUPLE: _ClassVar[ValueKind]
    VALUE_KIND_NONE: _ClassVar[ValueKind]

class TensorLayout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_LAYOUT_UNSPECIFIED: _ClassVar[TensorLayout]
    TENSOR_LAYOUT_STRIDED: _ClassVar[TensorLayout]

class MemoryFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMORY_FORMAT_UNSPECIFIED: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_CONTIGUOUS: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_PRESERVE: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_CHANNELS_LAST: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_CHANNELS_LAST_3D: _ClassVar[MemoryFormat]

class TensorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_KIND_UNSPECIFIED: _ClassVar[TensorKind]
    TENSOR_KIND_PARAMETER: _ClassVar[TensorKind]
    TENSOR_KIND_BUFFER: _ClassVar[TensorKind]
    TENSOR_KIND_CONSTANT: _ClassVar[TensorKind]

class LossForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_FORM_UNSPECIFIED: _ClassVar[LossForm]
    LOSS_FORM_MEAN_OVER_ROWS: _ClassVar[LossForm]
    LOSS_FORM_SUM_AND_WEIGHT: _ClassVar[LossForm]
GRAPH_KIND_UNSPECIFIED: GraphKind
GRAPH_KIND_TRAIN: GraphKind
GRAPH_KIND_EVALUATE: GraphKind
GRAPH_KIND_PREDICT: GraphKind
VALUE_KIND_UNSPECIFIED: ValueKind
VALUE_KIND_TENSOR: ValueKind
VALUE_KIND_INTEGER: ValueKind
VALUE_KIND_REAL: ValueKind
VALUE_KIND_BOOLEAN: ValueKind
VALUE_KIND_TUPLE: ValueKind
VALUE_KIND_NONE: ValueKind
TENSOR_LAYOUT_UNSPECIFIED: TensorLayout
TENSOR_LAYOUT_STRIDED: TensorLayout
MEMORY_FORMAT_UNSPECIFIED: MemoryFormat
MEMORY_FORMAT_CONTIGUOUS: MemoryFormat
MEMORY_FORMAT_PRESERVE: MemoryFormat
MEMORY_FORMAT_CHANNELS_LAST: MemoryFormat
MEMORY_FORMAT_CHANNELS_LAST_3D: MemoryFormat
TENSOR_KIND_UNSPECIFIED: TensorKind
TENSOR_KIND_PARAMETER: TensorKind
TENSOR_KIND_BUFFER: TensorKind
TENSOR_KIND_CONSTANT: TensorKind
LOSS_FORM_UNSPECIFIED: LossForm
LOSS_FORM_MEAN_OVER_ROWS: LossForm
LOSS_FORM_SUM_AND_WEIGHT: LossForm

class AffineSize(_message.Message):
    __slots__ = ("fixed", "per_row")
    FIXED_FIELD_NUMBER: _ClassVar[int]
    PER_ROW_FIELD_NUMBER: _ClassVar[int]
    fixed: int
    per_row: int
    def __init__(self, fixed: _Optional[int] = ..., per_row: _Optional[int] = ...) -> None: ...

class ValueSpec(_message.Message):
    __slots__ = ("kind", "data_type", "shape")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    kind: ValueKind
    data_type: _tensors_pb2.DataType
    shape: _containers.RepeatedCompositeFieldContainer[AffineSize]
    def __init__(self, kind: _Optional[_Union[ValueKind, str]] = ..., data_type: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[_Union[AffineSize, _Mapping]]] = ...) -> None: ...

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ArgumentList(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Argument]
    def __init__(self, items: _Optional[_Iterable[_Union[Argument, _Mapping]]] = ...) -> None: ...

class ComplexNumber(_message.Message):
    __slots__ = ("real", "imaginary")
    REAL_FIELD_NUMBER: _ClassVar[int]
    IMAGINARY_FIELD_NUMBER: _ClassVar[int]
    real: float
    imaginary: float
    def __init__(self, real: _Optional[float] = ..., imaginary: _Optional[float] = ...) -> None: ...

class Argument(_message.Message):
    __slots__ = ("value", "none", "boolean", "integer", "real", "text", "data_type", "device_kind", "layout", "memory_format", "list", "complex")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    COMPLEX_FIELD_NUMBER: _ClassVar[int]
    value: str
    none: Nothing
    boolean: bool
    integer: int
    real: float
    text: str
    data_type: _tensors_pb2.DataType
    device_kind: str
    layout: TensorLayout
    memory_format: MemoryFormat
    list: ArgumentList
    complex: ComplexNumber
    def __init__(self, value: _Optional[str] = ..., none: _Optional[_Union[Nothing, _Mapping]] = ..., boolean: bool = ..., integer: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ..., data_type: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., device_kind: _Optional[str] = ..., layout: _Optional[_Union[TensorLayout, str]] = ..., memory_format: _Optional[_Union[MemoryFormat, str]] = ..., list: _Optional[_Union[ArgumentList, _Mapping]] = ..., complex: _Optional[_Union[ComplexNumber, _Mapping]] = ...) -> None: ...

class NamedArgument(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: Argument
    def __init__(self, name: _Optional[str] = ..., value: _Optional[_Union[Argument, _Mapping]] = ...) -> None: ...

class Autocast(_message.Message):
    __slots__ = ("device_kind", "data_type", "enabled")
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    device_kind: str
    data_type: _tensors_pb2.DataType
    enabled: bool
    def __init__(self, device_kind: _Optional[str] = ..., data_type: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., enabled: bool = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("name", "target", "arguments", "keyword_arguments", "module_path", "source", "no_grad", "autocast", "mutated_arguments", "mutated_keyword_arguments", "random", "output", "flops", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    KEYWORD_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    MODULE_PATH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NO_GRAD_FIELD_NUMBER: _ClassVar[int]
    AUTOCAST_FIELD_NUMBER: _ClassVar[int]
    MUTATED_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    MUTATED_KEYWORD_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    RANDOM_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    target: str
    arguments: _containers.RepeatedCompositeFieldContainer[Argument]
    keyword_arguments: _containers.RepeatedCompositeFieldContainer[NamedArgument]
    module_path: str
    source: str
    no_grad: bool
    autocast: _containers.RepeatedCompositeFieldContainer[Autocast]
    mutated_arguments: _containers.RepeatedScalarFieldContainer[int]
    mutated_keyword_arguments: _containers.RepeatedScalarFieldContainer[str]
    random: bool
    output: ValueSpec
    flops: AffineSize
    bytes: AffineSize
    def __init__(self, name: _Optional[str] = ..., target: _Optional[str] = ..., arguments: _Optional[_Iterable[_Union[Argument, _Mapping]]] = ..., keyword_arguments: _Optional[_Iterable[_Union[NamedArgument, _Mapping]]] = ..., module_path: _Optional[str] = ..., source: _Optional[str] = ..., no_grad: bool = ..., autocast: _Optional[_Iterable[_Union[Autocast, _Mapping]]] = ..., mutated_arguments: _Optional[_Iterable[int]] = ..., mutated_keyword_arguments: _Optional[_Iterable[str]] = ..., random: bool = ..., output: _Optional[_Union[ValueSpec, _Mapping]] = ..., flops: _Optional[_Union[AffineSize, _Mapping]] = ..., bytes: _Optional[_Union[AffineSize, _Mapping]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "names", "kind", "persistent", "requires_grad", "data_type", "shape", "split")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PERSISTENT_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_GRAD_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    names: _containers.RepeatedScalarFieldContainer[str]
    kind: TensorKind
    persistent: bool
    requires_grad: bool
    data_type: _tensors_pb2.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    split: TensorSplit
    def __init__(self, name: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., kind: _Optional[_Union[TensorKind, str]] = ..., persistent: bool = ..., requires_grad: bool = ..., data_type: _Optional[_Union[_tensors_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., split: _Optional[_Union[TensorSplit, _Mapping]] = ...) -> None: ...

class TensorSplit(_message.Message):
    __slots__ = ("dimension", "sections")
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    SECTIONS_FIELD_NUMBER: _ClassVar[int]
    dimension: int
    sections: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dimension: _Optional[int] = ..., sections: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorUse(_message.Message):
    __slots__ = ("value", "tensor")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    value: str
    tensor: str
    def __init__(self, value: _Optional[str] = ..., tensor: _Optional[str] = ...) -> None: ...

class GraphInput(_message.Message):
    __slots__ = ("value", "label", "spec", "batched")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    BATCHED_FIELD_NUMBER: _ClassVar[int]
    value: str
    label: str
    spec: ValueSpec
    batched: bool
    def __init__(self, value: _Optional[str] = ..., label: _Optional[str] = ..., spec: _Optional[_Union[ValueSpec, _Mapping]] = ..., batched: bool = ...) -> None: ...

class BufferUpdate(_message.Message):
    __slots__ = ("value", "tensor")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    value: str
    tensor: str
    def __init__(self, value: _Optional[str] = ..., tensor: _Optional[str] = ...) -> None: ...

class GraphOutput(_message.Message):
    __slots__ = ("value", "batched")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    BATCHED_FIELD_NUMBER: _ClassVar[int]
    value: str
    batched: bool
    def __init__(self, value: _Optional[str] = ..., batched: bool = ...) -> None: ...

class Graph(_message.Message):
    __slots__ = ("kind", "inputs", "tensors", "nodes", "outputs", "allowed_cuts", "buffer_updates", "mutated_tensors", "mutated_inputs")
    KIND_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_CUTS_FIELD_NUMBER: _ClassVar[int]
    BUFFER_UPDATES_FIELD_NUMBER: _ClassVar[int]
    MUTATED_TENSORS_FIELD_NUMBER: _ClassVar[int]
    MUTATED_INPUTS_FIELD_NUMBER: _ClassVar[int]
    kind: GraphKind
    inputs: _containers.RepeatedCompositeFieldContainer[GraphInput]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorUse]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    outputs: _containers.RepeatedCompositeFieldContainer[GraphOutput]
    allowed_cuts: _containers.RepeatedScalarFieldContainer[int]
    buffer_updates: _containers.RepeatedCompositeFieldContainer[BufferUpdate]
    mutated_tensors: _containers.RepeatedScalarFieldContainer[str]
    mutated_inputs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, kind: _Optional[_Union[GraphKind, str]] = ..., inputs: _Optional[_Iterable[_Union[GraphInput, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorUse, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[GraphOutput, _Mapping]]] = ..., allowed_cuts: _Optional[_Iterable[int]] = ..., buffer_updates: _Optional[_Iterable[_Union[BufferUpdate, _Mapping]]] = ..., mutated_tensors: _Optional[_Iterable[str]] = ..., mutated_inputs: _Optional[_Iterable[str]] = ...) -> None: ...

class CustomOperator(_message.Message):
    __slots__ = ("target", "schema")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    target: str
    schema: str
    def __init__(self, target: _Optional[str] = ..., schema: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("tensors", "train", "evaluate", "predict", "loss_form", "operators")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    PREDICT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FORM_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    train: Graph
    evaluate: Graph
    predict: Graph
    loss_form: LossForm
    operators: _containers.RepeatedCompositeFieldContainer[CustomOperator]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., train: _Optional[_Union[Graph, _Mapping]] = ..., evaluate: _Optional[_Union[Graph, _Mapping]] = ..., predict: _Optional[_Union[Graph, _Mapping]] = ..., loss_form: _Optional[_Union[LossForm, str]] = ..., operators: _Optional[_Iterable[_Union[CustomOperator, _Mapping]]] = ...) -> None: ...
