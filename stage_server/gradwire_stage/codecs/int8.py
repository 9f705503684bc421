"""int8 in blocks of 256 elements with a scale each: a quarter of float32.

The error of an element is 1/254 of the largest magnitude of its block at most. Block-wise absolute maximum, as in
Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022), with linear levels and rounding to nearest.
Infinities and NaN stay what they are, and leave the rest of their block nearly as precise as it was (1/252): a block
that has some is marked by the sign of its scale. Blocks whose largest magnitude is below 2⁻¹²⁰ become zero. float64 is
rounded to float32 first, so that what is beyond its range becomes infinite.
"""

from __future__ import annotations

import torch

from gradwire_protocol.codecs import INT8_BLOCK, int8_blocks

_LEVELS = 127
# Of a block with elements that are not finite: three numbers stand for those.
_MARKED_LEVELS = 126
_INFINITE, _MINUS_INFINITE, _NAN = 127, -127, -128
_SMALLEST = 2.0**-120
# The largest scale whose largest multiple is still finite.
_LARGEST_SCALE = torch.finfo(torch.float32).max / _LEVELS * (1 - 2**-22)
_SCALE_BYTES = 4


def encode(elements: torch.Tensor) -> torch.Tensor:
    """Return the scales, then the numbers, as bytes. `elements` is flat."""
    values = elements.to(torch.float32)
    scale_bytes = _SCALE_BYTES * int8_blocks(values.numel())
    payload = torch.empty(scale_bytes + values.numel(), dtype=torch.uint8, device=values.device)
    scales, numbers = payload[:scale_bytes].view(torch.float32), payload[scale_bytes:].view(torch.int8)
    whole = values.numel() // INT8_BLOCK
    end = whole * INT8_BLOCK
    if whole:
        _encode_blocks(values[:end].view(whole, INT8_BLOCK), scales[:whole], numbers[:end].view(whole, INT8_BLOCK))
    if end < values.numel():
        _encode_blocks(values[end:].view(1, -1), scales[whole:], numbers[end:].view(1, -1))
    return payload


def decode(payload: torch.Tensor, data_type: torch.dtype) -> torch.Tensor:
    """Return the elements in the type wanted, flat."""
    # b blocks of n elements took 4 b + n bytes.
    blocks = -(-payload.numel() // (INT8_BLOCK + _SCALE_BYTES))
    scales, numbers = payload[: _SCALE_BYTES * blocks].view(torch.float32), payload[_SCALE_BYTES * blocks :]
    values = numbers.view(torch.int8).to(torch.float32)
    whole = values.numel() // INT8_BLOCK
    end = whole * INT8_BLOCK
    if whole:
        _decode_blocks(values[:end].view(whole, INT8_BLOCK), scales[:whole])
    if end < values.numel():
        _decode_blocks(values[end:].view(1, -1), scales[whole:])
    return values.to(data_type)


def _encode_blocks(values: torch.Tensor, scales: torch.Tensor, numbers: torch.Tensor) -> None:
    """Fill `scales` (blocks) and `numbers` (blocks, elements) from `values` (blocks, elements)."""
    largest = values.abs().amax(dim=1)
    # Looked up on the CPU only: elsewhere the host would have to wait for the answer, which costs more than the work.
    if values.is_cpu and bool(largest.isfinite().all()):
        factors, block_scales = _factors(largest, torch.full_like(largest, _LEVELS))
        scales.copy_(block_scales)
        numbers.copy_(values.mul(factors[:, None]).round_())
        return
    marked = ~largest.isfinite()
    finite = values.isfinite()
    known = torch.where(finite, values, 0.0)
    levels = torch.where(marked, float(_MARKED_LEVELS), float(_LEVELS))
    factors, block_scales = _factors(known.abs().amax(dim=1), levels)
    scales.copy_(torch.where(marked, -block_scales, block_scales))
    rounded = known.mul_(factors[:, None]).round_()
    rounded.masked_fill_(values == torch.inf, _INFINITE)
    rounded.masked_fill_(values == -torch.inf, _MINUS_INFINITE)
    numbers.copy_(rounded.masked_fill_(values.isnan(), _NAN))


def _factors(largest: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what elements are multiplied with, and the scales that undo it; 0 for blocks that become zero.

    Two tensors, because torch divides by a number otherwise, in the last bit.
    """
    counts = largest >= _SMALLEST
    factors = torch.where(counts, levels / largest, 0.0)
    return factors, torch.where(counts, (largest / levels).clamp_(max=_LARGEST_SCALE), 0.0)


def _decode_blocks(values: torch.Tensor, scales: torch.Tensor) -> None:
    """Turn numbers (blocks, elements) into elements, in place."""
    marked = scales.signbit()
    if values.is_cpu and not bool(marked.any()):
        values.mul_(scales[:, None])
        return
    marked = marked[:, None]
    infinite = marked & (values == _INFINITE)
    minus_infinite = marked & (values == _MINUS_INFINITE)
    nan = marked & (values == _NAN)
    values.mul_(scales.abs()[:, None])
    values.masked_fill_(infinite, torch.inf).masked_fill_(minus_infinite, -torch.inf).masked_fill_(nan, torch.nan)
