"""What tensor_parallel.py compares with: torch's `parallelize_module` with DTensor over gloo, on the work of peers.py.

Each of two processes has half of every block's heads and hidden units. Run as `tensor_peers.py PEER RANK RENDEZVOUS`: a
line on standard input is a number of steps, the answer the seconds that they took.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from gradwire.job.gpt import next_byte_loss
from peers import BATCH, LEARNING_RATE, MICRO_BATCHES, SHAPE, make_batch, make_model, serve

SERVERS = 2
DTENSOR = "torch parallelize_module, gloo"


class Attention(nn.Module):
    """The GPT's attention with a projection each for queries, keys and values: DTensor cuts a fused one across them."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads  # of this process
        self.query, self.key, self.value = (nn.Linear(SHAPE.width, SHAPE.width) for _ in range(3))
        self.projection = nn.Linear(SHAPE.width, SHAPE.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, context, _ = x.shape
        query, key, value = (
            part(x).view(batch, context, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: torch.Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, context, -1))
        return result


def make_step() -> Callable[[], None]:
    mesh = init_device_mesh("cpu", (SERVERS,))
    model = make_model()
    for block in model.blocks:
        block.attention = Attention(SHAPE.heads // SERVERS)
        names = ("attention.query", "attention.key", "attention.value", "mlp.0")
        styles = {name: ColwiseParallel() for name in names}
        rows = {name: RowwiseParallel() for name in ("attention.projection", "mlp.2")}
        parallelize_module(block, mesh, {**styles, **rows})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    inputs, targets = make_batch()

    def step() -> None:
        for x, y in zip(inputs.tensor_split(MICRO_BATCHES), targets.tensor_split(MICRO_BATCHES), strict=True):
            (next_byte_loss(model(x), y) * (len(x) / BATCH)).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    rank, rendezvous = int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=SERVERS)
    step = make_step()
    serve(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
