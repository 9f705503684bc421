"""Text to train on: what is held out for validation, and batches that depend on the seed alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gradwire.job.files import read_text, standard_library, text_files
from gradwire_protocol.errors import DataError

# One file in this many is held out; where there are fewer files, this share of the text's end.
_HELD_OUT = 20


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes that training never sees, as uint8 tensors."""

    training: torch.Tensor
    validation: torch.Tensor
    source: str


def load_text(path: Path | None, minimum_bytes: int) -> Text:
    """Read a file, or all text files of a folder; None: the standard library's own sources.

    minimum_bytes: how much each part must have. DataError for what cannot be read, and for too little of it.
    """
    source = str(path) if path is not None else f"the standard library's source text in {standard_library()}"
    contents = [content for content in map(read_text, text_files(path)) if content]
    training, validation = _split(contents)
    for name, part in (("training", training), ("validation", validation)):
        if len(part) < minimum_bytes:
            raise DataError(
                f"There is too little text for {name} in {source}",
                expected=f"{minimum_bytes} bytes or more, after 1/{_HELD_OUT} of the text is held out for validation",
                got=f"{len(part)} bytes, from {len(contents)} text files",
                remedy="give a file or folder with more text, or a smaller --context",
            )
    return Text(_tensor(training), _tensor(validation), source)


def _split(contents: list[bytes]) -> tuple[bytes, bytes]:
    if len(contents) < _HELD_OUT:
        whole = b"".join(contents)
        cut = len(whole) - len(whole) // _HELD_OUT
        return whole[:cut], whole[cut:]
    held_out = contents[_HELD_OUT // 2 :: _HELD_OUT]
    kept = [content for index, content in enumerate(contents) if index % _HELD_OUT != _HELD_OUT // 2]
    return b"".join(kept), b"".join(held_out)


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class Windows:
    """Training batches (x, y), both (batch, context) of int64, y one byte ahead of x.

    The text is cut into windows; an epoch takes each once, in an order, and at an offset of the cuts, that depend on
    the seed and the epoch's number. The last batch may be smaller.
    """

    def __init__(self, text: torch.Tensor, *, context: int, batch: int, seed: int) -> None:
        self._text = text
        self._context = context
        self._batch = batch
        self._seed = seed
        # An offset may cost one window, and every window needs the byte after it.
        self.windows = max(1, (len(text) - 1) // context - 1)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self.windows // self._batch)

    def from_step(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches behind the first `step` ones, epoch after epoch, without end."""
        epoch, taken = divmod(step, len(self))
        while True:
            yield from self.epoch(epoch, taken)
            epoch, taken = epoch + 1, 0

    def position(self, step: int) -> dict[str, int]:
        """Return what the batches behind the first `step` ones depend on."""
        return {
            "step": step,
            "seed": self._seed,
            "batch": self._batch,
            "context": self._context,
            "windows": self.windows,
            "crc32": zlib.crc32(self._text.numpy().data),
        }

    def epoch(self, number: int, taken: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of an epoch, the first one's number being 0, but for the first `taken` of them."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        slack = len(self._text) - 1 - self.windows * self._context
        offset = int(torch.randint(min(slack, self._context - 1) + 1, (), generator=generator))
        order = torch.randperm(self.windows, generator=generator)
        for first in range(taken * self._batch, self.windows, self._batch):
            starts = order[first : first + self._batch] * self._context + offset
            yield window_batch(self._text, starts, self._context)


def validation_batches(
    text: torch.Tensor, *, context: int, batch: int, windows: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of at most `windows` windows, spread evenly over the text: the same ones every time."""
    available = (len(text) - 1) // context
    count = min(windows, available)
    starts = torch.arange(count) * available // count * context
    return [window_batch(text, starts[first : first + batch], context) for first in range(0, count, batch)]


def window_batch(text: torch.Tensor, starts: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the windows that begin at `starts`, and the same shifted by one byte."""
    window = text[starts[:, None] + torch.arange(context + 1)].long()  # (batch, context + 1)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()
