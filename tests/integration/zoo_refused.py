"""Models that are refused: what each error says, the user's line that it names, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from model_zoo import Batch, Refused, squared_loss
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint


class Doubled(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class Body(nn.Module):
    """A submodule that does one thing that cannot be exported."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear, self.recurrent = nn.Linear(6, 6), nn.LSTM(6, 6, batch_first=True)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *inputs)


class Model(nn.Module):
    """A model with that submodule at `body`."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.body = Body(function)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.body(*inputs)


def branch(body: Body, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        x = -x
    return body.linear(x)


def cond(body: Body, x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (body.linear(x),))


def vmap(body: Body, x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: body.linear(row) * row.sum())(x)


def packed(body: Body, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return body.recurrent(sequence)[1][0][-1]


def penalty(body: Body, x: torch.Tensor) -> torch.Tensor:
    x = x.requires_grad_()
    y = torch.tanh(body.linear(x))
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y + gradient.norm(dim=1, keepdim=True)


def custom(body: Body, x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(body.linear(x))


def hook(body: Body, x: torch.Tensor) -> torch.Tensor:
    y = body.linear(x)
    y.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return y


def reentrant(body: Body, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(body.linear, x, use_reentrant=True)


def fixed_rows(body: Body, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([body.linear(x[row]) for row in range(x.shape[0])])


def sparse(body: Body, x: torch.Tensor) -> torch.Tensor:
    return F.embedding(x.argmax(1), body.linear.weight, sparse=True)


def unique(body: Body, x: torch.Tensor) -> torch.Tensor:
    return body.linear(x) + x.round().unique().sum()


def nested(body: Body, x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([body.linear(x)[0], x[1]]).to_padded_tensor(0.0)


def numpy(body: Body, x: torch.Tensor) -> torch.Tensor:
    return body.linear(x) + torch.from_numpy(x.numpy())


def flex(body: Body, x: torch.Tensor) -> torch.Tensor:
    query = body.linear(x)[:, None]
    return flex_attention(query, query, query)[:, 0]


def ctc(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    rows, time, _ = scores.shape
    lengths = torch.full((rows,), time), torch.full((rows,), targets.shape[1])
    return F.ctc_loss(scores.log_softmax(-1).transpose(0, 1), targets, *lengths)


def with_backward_hook() -> nn.Module:
    model = Model(lambda body, x: body.linear(x))
    model.body.linear.register_full_backward_hook(lambda *_: None)
    return model


def scripted() -> nn.Module:
    model = Model(lambda body, x: body.linear(x))
    model.body.linear = torch.jit.script(nn.Linear(6, 6))
    return model


def vectors() -> Batch:
    return torch.randn(3, 6), torch.randn(3, 6)


def sequences() -> Batch:
    return torch.randn(3, 4, 6), torch.randn(3, 4, 6)


def with_lengths() -> Batch:
    return torch.randn(3, 4, 6), torch.tensor([4, 2, 1]), torch.randn(3, 6)


def alignments() -> Batch:
    return torch.randn(3, 4, 6), torch.randint(1, 6, (3, 2))


def refused(
    name: str,
    make: Callable[..., Any],
    message: str,
    line: str,
    way_out: str,
    *,
    batch: Callable[[], Batch] = vectors,
    loss: Any = squared_loss,
    whole: bool = False,
) -> Refused:
    """`make` is what the submodule does; if `whole`, what makes the model."""
    model = make if whole else lambda: Model(make)
    return Refused(name=name, make=model, batch=batch, loss=loss, message=message, line=line, way_out=way_out)


REFUSED = (
    refused(
        "`if` on the data of a tensor",
        branch,
        "Control flow or a size depends on the data of a tensor",
        "if x.sum() > 0:",
        "use torch.where",
    ),
    refused("`torch.cond`", cond, "torch.cond cannot be", "torch.cond(x.sum() > 0", "choose with torch.where"),
    refused("`torch.vmap`", vmap, "torch.vmap cannot be part of a graph", "", "broadcasting, torch.einsum, matmul"),
    refused(
        "A number of rows made a number",
        fixed_rows,
        "works for some numbers of rows only",
        "for row in range(x.shape[0])",
        "use tensor operators on it",
    ),
    refused(
        "Packed sequences",
        packed,
        "A packed sequence cannot be exported",
        "pack_padded_sequence(x, lengths",
        "give padded sequences",
        batch=with_lengths,
    ),
    refused(
        "`F.ctc_loss`",
        lambda body, x: body.linear(x),
        "F.ctc_loss cannot be exported",
        "return F.ctc_loss(",
        "train with another loss",
        batch=alignments,
        loss=ctc,
    ),
    refused(
        "Gradient penalty",
        penalty,
        "A gradient taken inside the forward pass or the loss would be lost",
        "torch.autograd.grad(y.sum(), x",
        "write the derivative out",
    ),
    refused(
        "Custom `autograd.Function`",
        custom,
        "The backward of autograd.Function 'Doubled' would be lost",
        "return Doubled.apply(",
        "torch's own differentiable operators, or as torch.library.custom_op",
    ),
    refused(
        "`Tensor.register_hook`",
        hook,
        "A hook on a tensor's gradient would be lost",
        "y.register_hook(",
        "remove Tensor.register_hook",
    ),
    refused(
        "Backward hooks on modules",
        with_backward_hook,
        "The backward hook on Linear would be lost",
        "",
        "remove the hook",
        whole=True,
    ),
    refused(
        "Scripted submodules",
        scripted,
        "A scripted module ('Linear') cannot be exported",
        "",
        "give the Python module",
        whole=True,
    ),
    refused(
        "Reentrant checkpoints",
        reentrant,
        "A reentrant checkpoint would be lost",
        "use_reentrant=True",
        "use_reentrant=False",
    ),
    refused("Sparse gradients", sparse, "makes sparse gradients", "", "sparse=False"),
    refused(
        "`flex_attention` on the CPU",
        flex,
        "flex_attention cannot be exported",
        "flex_attention(query",
        "F.scaled_dot_product_attention",
        batch=sequences,
    ),
    refused("Nested tensors", nested, "A nested tensor cannot be", "torch.nested.nested_tensor", "padded tensors"),
    refused("NumPy in the forward pass", numpy, "Tensor.numpy() cannot be", "x.numpy()", "torch's operators"),
    refused(
        "Operators that are not listed, such as `unique`",
        unique,
        "Operator aten._unique2.default is not allowed",
        "",
        "with other torch operators",
    ),
)
