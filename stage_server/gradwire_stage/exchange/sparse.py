"""Sparse gradients as bytes: which elements of a flat tensor are meant, packed, and their values.

Where blocks of 65,536 elements have more than two of them on average: int32 counts by block, the values, and each
element's place in its block as two bytes (less 32,768: int16). Otherwise int32 places, then the values. The length
tells which, and how many there are.
"""

from __future__ import annotations

import torch

from gradwire_protocol.errors import FrameError
from gradwire_protocol.gradient_codecs import INDEX_BLOCK, index_bytes

_COUNT_BYTES = 4
_HALF_BLOCK = INDEX_BLOCK // 2
_BLOCK_BITS = INDEX_BLOCK.bit_length() - 1


def pack(places: torch.Tensor, values: torch.Tensor, elements: int) -> torch.Tensor:
    """Return the bytes. places: int64, ascending, among so many elements; values: floats of 2 or 4 bytes."""
    count, blocks = places.numel(), _blocks(elements)
    if index_bytes(elements, count) == _COUNT_BYTES * count:
        parts = [places.to(torch.int32), values]
    else:
        counts = torch.bincount(places >> _BLOCK_BITS, minlength=blocks)
        parts = [counts.to(torch.int32), values, ((places & (INDEX_BLOCK - 1)) - _HALF_BLOCK).to(torch.int16)]
    return torch.cat([part.view(torch.uint8) for part in parts])


def unpack(
    payload: torch.Tensor, elements: int, most: int, data_type: torch.dtype, sender: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return places and values; FrameError, which names the sender, for what is no such payload.

    most: of the elements that it may name. data_type: of the values.
    """
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise _malformed(sender, "flat bytes", f"shape {list(payload.shape)}, {payload.dtype}")
    size, value_bytes, blocks = payload.numel(), data_type.itemsize, _blocks(elements)
    if size <= 2 * blocks * (_COUNT_BYTES + value_bytes):
        count, left = divmod(size, _COUNT_BYTES + value_bytes)
        _check(count, left, most, sender)
        places = payload[: _COUNT_BYTES * count].view(torch.int32).to(torch.int64)
        values = payload[_COUNT_BYTES * count :].view(data_type)
    else:
        start = _COUNT_BYTES * blocks
        count, left = divmod(size - start, 2 + value_bytes)
        _check(count, left, most, sender)
        end = start + value_bytes * count
        counts = payload[:start].view(torch.int32)
        if bool((counts < 0).any()) or int(counts.sum()) != count:
            raise _malformed(sender, f"blocks that have {count} elements together", f"{int(counts.sum())}")
        values = payload[start:end].view(data_type)
        starts = torch.arange(blocks, device=payload.device) * INDEX_BLOCK
        places = torch.repeat_interleave(starts, counts.to(torch.int64), output_size=count)
        places += payload[end:].view(torch.int16)
        places += _HALF_BLOCK
    if count and bool((places[1:] <= places[:-1]).any() | (places[0] < 0) | (places[-1] >= elements)):
        raise _malformed(sender, f"ascending places among {elements}", f"{int(places.min())} to {int(places.max())}")
    return places, values


def _blocks(elements: int) -> int:
    return -(-elements // INDEX_BLOCK)


def _check(count: int, left: int, most: int, sender: str) -> None:
    if left or count > most:
        raise _malformed(sender, f"at most {most} whole elements", f"{count}, and {left} bytes more")


def _malformed(sender: str, expected: str, got: str) -> FrameError:
    return FrameError(f"Sparse gradients that {sender} sent do not fit", expected=expected, got=got)
