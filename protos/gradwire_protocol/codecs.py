"""Codecs by name and number, and how many bytes each makes of a tensor: what every service must know of them.

Imports no torch, so that the coordinator can plan with them and frames can be checked before anything is allocated. The
arithmetic itself is the stage servers' (gradwire_stage.codecs).
"""

from __future__ import annotations

from gradwire_protocol.errors import FrameError
from gradwire_protocol.v1 import tensors_pb2 as pb

# Element types that codecs take.
FLOATING: dict[int, int] = {
    pb.DATA_TYPE_FLOAT64: 8,
    pb.DATA_TYPE_FLOAT32: 4,
    pb.DATA_TYPE_FLOAT16: 2,
    pb.DATA_TYPE_BFLOAT16: 2,
}
CODEC_NAMES: dict[str, pb.Codec] = {
    "none": pb.CODEC_NONE,
    "bf16": pb.CODEC_BF16,
    "fp16": pb.CODEC_FP16,
    "int8": pb.CODEC_INT8,
}
NAME_OF_CODEC: dict[int, str] = {codec: name for name, codec in CODEC_NAMES.items()}
# In a plan: chosen when a run is created, from what its links were measured to carry.
AUTO = "auto"

INT8_BLOCK = 256
_SCALE_BYTES = 4
_HALF_BYTES = 2
_LOSSY_DIRECTIONS = frozenset({pb.DIRECTION_FORWARD, pb.DIRECTION_BACKWARD})

if set(NAME_OF_CODEC) != set(pb.Codec.values()) - {pb.CODEC_UNSPECIFIED}:
    raise RuntimeError("every codec of the protocol needs a name in gradwire_protocol.codecs")


def encoded_bytes(codec: int, data_type: int, elements: int) -> int:
    """Return the bytes of payload of a floating tensor of so many elements under a codec."""
    match codec:
        case pb.CODEC_BF16 | pb.CODEC_FP16:
            return _HALF_BYTES * elements
        case pb.CODEC_INT8:
            return _SCALE_BYTES * int8_blocks(elements) + elements
    return FLOATING[data_type] * elements


def int8_blocks(elements: int) -> int:
    """Return the number of blocks, the last of which may be shorter."""
    return -(-elements // INT8_BLOCK)


def codec_for(codec: pb.Codec, data_type: int, elements: int) -> pb.Codec:
    """Return the codec itself where it makes a tensor smaller; CODEC_NONE where not, or where the type is not floating.

    So a float16 tensor travels as it is under fp16, and a single number under int8.
    """
    size = FLOATING.get(data_type)
    if size is None or encoded_bytes(codec, data_type, elements) >= size * elements:
        return pb.CODEC_NONE
    return codec


def set_codec(info: pb.TensorInfo, codec: pb.Codec, elements: int) -> pb.Codec:
    """Write into a tensor's description that it travels under a codec, if it gains by that; return the codec then."""
    info.codec = codec_for(codec, info.data_type, elements)
    if info.codec != pb.CODEC_NONE:
        info.size_bytes = encoded_bytes(info.codec, info.data_type, elements)
    return info.codec


def check_encoded(info: pb.TensorInfo, direction: int, elements: int) -> int:
    """Return the bytes of payload of an encoded tensor; FrameError if it may not be encoded so."""
    if info.codec not in NAME_OF_CODEC:
        raise FrameError("Unknown codec", expected=f"one of {pb.Codec.keys()[1:]}", got=str(info.codec))
    if info.data_type not in FLOATING or direction not in _LOSSY_DIRECTIONS:
        raise FrameError(
            "A message is encoded that must not be",
            expected="CODEC_NONE but for floating tensors under FORWARD and BACKWARD",
            got=f"{pb.Codec.Name(info.codec)} of {pb.DataType.Name(info.data_type)} under {direction}",
        )
    return encoded_bytes(info.codec, info.data_type, elements)
