"""What stands between a product by columns and one by rows, one function for each way of using parts; and a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LENGTH, WIDTH, INNER, HEADS = 3, 8, 24, 4
Tensor = torch.Tensor
RULES = {"up.weight": "column", "down.weight": "row"}


class Pair(nn.Module):
    """`up` to 24 features, of which each server has a part; what is in between; `down` from what that gives."""

    table: Tensor

    def __init__(self, middle: Callable[[Pair, Tensor], Tensor], out: int = INNER, *, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(out, WIDTH, bias=bias)
        self.six, self.all = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(INNER))
        self.batch_norm = nn.BatchNorm1d(INNER)
        self.register_buffer("table", torch.randn(INNER))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x + self.down(self.middle(self, self.up(self.norm(x)))))
        return result


def pair_batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, LENGTH, WIDTH).double(), torch.randn(rows, LENGTH, WIDTH).double()


def heads(h: Tensor, count: int = HEADS) -> Tensor:
    """(rows, length, count · size) → (rows, count, length, size)"""
    return h.view(h.shape[0], h.shape[1], count, -1).transpose(1, 2)


def mixed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    made = F.scaled_dot_product_attention(q, k, v, **options)
    return made.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def attended(*parts: Tensor, **options: Any) -> Tensor:
    return mixed(*(heads(part) for part in parts), **options)


def by_view(m: Pair, h: Tensor) -> Tensor:
    q, k, v = h.view(h.shape[0], h.shape[1], 3, HEADS, 2).unbind(2)
    return mixed(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def by_permute(m: Pair, h: Tensor) -> Tensor:
    qkv = h.reshape(h.shape[0], h.shape[1], 3, HEADS, 2).permute(2, 0, 3, 1, 4)
    return mixed(qkv[0], qkv[1], qkv[2])


def fused_by_head(m: Pair, h: Tensor) -> Tensor:
    return mixed(*heads(h).chunk(3, -1))


def grouped(m: Pair, h: Tensor, *, repeats: bool) -> Tensor:
    """Four heads of queries, two of keys and values."""
    q, k, v = h.split([12, 6, 6], -1)
    k, v = heads(k, 2), heads(v, 2)
    if not repeats:
        return mixed(heads(q), k, v, enable_gqa=True)
    k, v = (part[:, :, None].expand(-1, 2, 2, LENGTH, 3).reshape(part.shape[0], HEADS, LENGTH, 3) for part in (k, v))
    return mixed(heads(q), k, v)


def eager_attention(m: Pair, h: Tensor) -> Tensor:
    q, k, v = (heads(part) for part in h.chunk(3, -1))
    scores = (q @ k.transpose(-1, -2)) / 2**0.5
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(h.shape[0], LENGTH, 8)


def dropped_attention(m: Pair, h: Tensor) -> Tensor:
    q, k, v = (heads(part) for part in h.chunk(3, -1))
    weights = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.4, m.training)
    return (weights @ v).transpose(1, 2).reshape(h.shape[0], LENGTH, 8)


def masked(m: Pair, h: Tensor, mask: Tensor) -> Tensor:
    return attended(*h.chunk(3, -1), attn_mask=mask + torch.zeros(LENGTH, LENGTH, dtype=h.dtype))


def in_place(m: Pair, h: Tensor) -> Tensor:
    h = h * 1
    h.mul_(2)
    h[:, 0] += 1
    h.view(h.shape[0], -1, 4, 6).add_(m.six)
    h.select(1, 1).zero_()
    return F.relu_(h)


def normed_heads(m: Pair, h: Tensor) -> Tensor:
    h = F.layer_norm(h.view(h.shape[0], LENGTH, 4, 6), (6,), m.six, m.six)
    h = F.rms_norm(h, (6,), m.six)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * m.six).flatten(2)


def rotated(m: Pair, h: Tensor) -> Tensor:
    h = h.view(h.shape[0], LENGTH, 4, 6)
    turned = torch.cat([-h[..., 3:], h[..., :3]], -1)
    cosine, sine = torch.arange(18.0, dtype=h.dtype).view(LENGTH, 1, 6).cos(), m.six.sin()
    return (h * cosine + turned * sine).flatten(2)


def sizes(m: Pair, h: Tensor) -> Tensor:
    rows, features = h.size(0), h.size(-1)
    h = h.view(rows, -1, 4, features // 4).transpose(1, 2).contiguous().view(rows, 4, -1)
    h = h.view(-1, 4, LENGTH, 6).transpose(1, 2).reshape(rows * LENGTH, features).view(-1, LENGTH, features)
    return h.unflatten(-1, (4, -1)).flatten(-2) * h.numel() / features


def rearranged(m: Pair, h: Tensor) -> Tensor:
    h = h.permute(2, 0, 1).unsqueeze(0).squeeze(0).permute(1, 2, 0)
    h = h.mT.contiguous().transpose(-1, -2).expand(2, *h.shape).sum(0)
    h = torch.cat([h, h * 2], 1).view(h.shape[0], 2, LENGTH, INNER).select(1, 1)
    h = torch.stack(h.unbind(1), 1)
    return torch.stack([h, h[:, :1].expand_as(h)], 2).mean(2)


def one_each(m: Pair, h: Tensor) -> Tensor:
    """With two servers, one has a dimension of one."""
    return h.view(h.shape[0], LENGTH, 2, 12, 1).squeeze().squeeze(2).transpose(2, 3).transpose(2, 3).flatten(2)


def cut_and_joined(m: Pair, h: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    joined = torch.cat([b, a.tanh()], -1)
    return torch.cat([joined[..., :12], joined[..., 12:]], -1) * m.all


def without_gradient(m: Pair, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.flip(-1) + h.abs().mean(-1, keepdim=True) + h * m.all
    return h.flip(-1) * scale + h * m.all


def again(m: Pair, h: Tensor) -> Tensor:
    return h + m.up(h[..., :WIDTH].tanh())


def normed_batch(m: Pair, h: Tensor) -> Tensor:
    made: Tensor = m.batch_norm(h.transpose(1, 2)).transpose(1, 2)
    return made


def convolved(m: Pair, h: Tensor) -> Tensor:
    return F.conv1d(h.transpose(1, 2), m.all.view(1, INNER, 1).expand(INNER, INNER, 1)).transpose(1, 2)


def multiplied(m: Pair, h: Tensor) -> Tensor:
    h = torch.bmm(torch.bmm(h, h.transpose(1, 2)), h) / 10
    h = torch.einsum("nti,nsi->nts", h, h) @ h / 10
    return h + (h @ m.all).unsqueeze(-1) + (m.all.view(LENGTH, WIDTH)[:, :LENGTH] @ h)


@dataclass(frozen=True)
class Middle:
    """A function between two products, the features that it gives, and the group operators beside a COPY and a SUM."""

    make: Callable[[Pair, Tensor], Tensor]
    out: int = INNER
    further: tuple[str, ...] = ()
    random: bool = False


def gathered_twice(m: Pair, h: Tensor) -> Tensor:
    """An operator without a rule gets the whole of a view, before and after its memory is written to."""
    view = h.unsqueeze(0)
    before = view.flip(-1)
    h.mul_(2)
    return (before + view.flip(-1)).squeeze(0)


MIDDLES: dict[str, Middle] = {
    "gelu": Middle(lambda m, h: F.gelu(h)),
    "glu": Middle(lambda m, h: F.glu(h, -1), INNER // 2),
    "glu along another dimension": Middle(lambda m, h: F.glu(torch.cat([h, h.tanh()], 1), 1)),
    "movedim": Middle(
        lambda m, h: h.view(*h.shape[:2], HEADS, -1).movedim((2, 3), (0, 1)).tanh().movedim((1, 0), (-1, -2)).flatten(2)
    ),
    "chunk": Middle(lambda m, h: attended(*h.chunk(3, -1), is_causal=True), 8),
    "split": Middle(lambda m, h: attended(*h.split(8, -1)), 8),
    "slices": Middle(lambda m, h: attended(h[..., :8], h[..., 8:-8], h[..., -8:]), 8),
    "view": Middle(by_view, 8),
    "permute": Middle(by_permute, 8),
    "fused by head": Middle(fused_by_head, 8),
    "repeated keys": Middle(lambda m, h: grouped(m, h, repeats=True), 12),
    "grouped queries": Middle(lambda m, h: grouped(m, h, repeats=False), 12),
    "eager attention": Middle(eager_attention, 8),
    "mask for all": Middle(lambda m, h: masked(m, h, m.six[:3, None]), 8, ("copy",)),
    "mask for heads": Middle(lambda m, h: masked(m, h, m.all[:4, None, None]), 8, ("split",)),
    "dropped scores": Middle(dropped_attention, 8, ("dropout",), random=True),
    "dropped in attention": Middle(
        lambda m, h: attended(*h.chunk(3, -1), dropout_p=0.3 * m.training), 8, ("attention",), random=True
    ),
    "dropout": Middle(
        lambda m, h: F.dropout(F.dropout(h, 0.5, m.training), 0.0, m.training), 24, ("dropout",), random=True
    ),
    "gated": Middle(lambda m, h: F.silu(h[..., :12]) * h[..., 12:], 12),
    "gathered twice": Middle(gathered_twice, 24, ("gather", "gather", "split")),
    "in place": Middle(in_place, 24, ("copy",)),
    "norms of heads": Middle(normed_heads, 24, ("copy",)),
    "rotated": Middle(rotated, 24, ("copy",)),
    "sizes": Middle(sizes),
    "rearranged": Middle(rearranged, 24, ("gather", "gather", "split")),
    "one each": Middle(one_each),
    "cut and joined": Middle(cut_and_joined, 24, ("split",)),
    "sum over parts": Middle(
        lambda m, h: h * h.sum() - h.mean((-1, 0), keepdim=True), 24, ("sum", "sum", "copy", "copy")
    ),
    "sum over rows": Middle(lambda m, h: h * h.sum(0) + h.mean((0, 1))),
    "softmax": Middle(lambda m, h: h.softmax(-1) + h.softmax(1), 24, ("gather", "split")),
    "largest": Middle(lambda m, h: h - h.amax(-1, keepdim=True), 24, ("gather", "copy")),
    "gather": Middle(lambda m, h: h.gather(-1, torch.arange(24).flip(0).expand(h.shape)), 24, ("gather", "split")),
    "buffer": Middle(lambda m, h: torch.where(h > 0, h, m.table), 24, ("split",)),
    "no gradient": Middle(without_gradient, 24, ("gather", "gather", "split", "split", "split", "split", "sum")),
    "weight used twice": Middle(again, 24, ("gather", "copy")),
    "batch norm": Middle(normed_batch, 24, ("gather", "split")),
    "convolution": Middle(convolved, 24, ("gather", "split")),
    "products": Middle(multiplied, 24, ("gather", "gather", "sum", *("copy",) * 4)),
}
