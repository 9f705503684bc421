"""fp16 and bf16 for gradients: two bytes an element.

Gradients are sums over rows, and what is added up grows from hop to hop. So fp16 scales: a power of two, as float32
before the halves, by which the largest finite magnitude comes between 2¹⁴ and 2¹⁵. bfloat16 has float32's range.
Infinities and NaN stay what they are, and what rounds beyond that range becomes infinite.
"""

from __future__ import annotations

import torch

from gradwire_stage.codecs import bf16, fp16
from gradwire_stage.exchange.element_codec import ElementCodec

_SCALE_BYTES = 4
_EXPONENT_BITS = 0x7F800000
_BELOW_LARGEST = 2.0**-14
# Its inverse is finite, too.
_SMALLEST_SCALE = 2.0**-126


def encode_fp16(elements: torch.Tensor) -> torch.Tensor:
    """Return the scale and the halves, as bytes. elements: flat, one or more; float64 is rounded to float32 first."""
    values = elements.to(torch.float32)
    payload = torch.empty(_SCALE_BYTES + 2 * values.numel(), dtype=torch.uint8, device=values.device)
    scale = payload[:_SCALE_BYTES].view(torch.float32)
    scale.copy_(_scale(values))
    payload[_SCALE_BYTES:].view(torch.float16).copy_(values * scale.reciprocal())
    return payload


def decode_fp16(payload: torch.Tensor, data_type: torch.dtype) -> torch.Tensor:
    """Return the elements in the type wanted."""
    scale = payload[:_SCALE_BYTES].view(torch.float32)
    return fp16.decode(payload[_SCALE_BYTES:], torch.float32).mul_(scale).to(data_type)


def _scale(values: torch.Tensor) -> torch.Tensor:
    low, high = values.aminmax()
    largest = torch.maximum(-low, high)
    # Looked up on the CPU only: elsewhere the host would have to wait for the answer, which costs more than the work.
    if not (values.is_cpu and bool(largest.isfinite())):
        largest = torch.where(values.isfinite(), values.abs(), 0.0).amax()
    power = (largest.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return (power * _BELOW_LARGEST).clamp_(min=_SMALLEST_SCALE)


FP16 = ElementCodec("fp16", encode_fp16, decode_fp16, element_bytes=2)
BF16 = ElementCodec("bf16", bf16.encode, bf16.decode, element_bytes=2)
