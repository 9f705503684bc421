"""What exchange.py compares with: torch's DistributedDataParallel over gloo, and two processes that exchange nothing.

Each of two processes does half of the work of peers.py, in half of the micro-batches; gradients are exchanged with the
last of them. Run as `exchange_peers.py PEER RANK RENDEZVOUS`: a line on standard input is a number of steps, the answer
the seconds that they took.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from gradwire.job.gpt import next_byte_loss
from peers import LEARNING_RATE, MICRO_BATCHES, make_batch, make_model, serve

REPLICAS = 2
RANK_OF_POWERSGD = 4
DDP, DDP_FP16, DDP_POWERSGD = "torch DDP", "torch DDP, fp16 hook", "torch DDP, PowerSGD hook"
ALONE = "2 processes, no exchange"
EXCHANGE_PEERS = (DDP, DDP_FP16, DDP_POWERSGD, ALONE)


# One bucket for all: hooks that chain collectives issue those of several buckets in any order, which gloo cannot tell
# apart.
_WHOLE_MODEL_MIB = 64


def distributed(model: nn.Module, name: str) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(model, bucket_cap_mb=_WHOLE_MODEL_MIB if name == DDP_POWERSGD else None)
    if name == DDP_FP16:
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name == DDP_POWERSGD:
        state = powerSGD_hook.PowerSGDState(None, RANK_OF_POWERSGD, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return wrapped


def make_step(name: str, rank: int) -> Callable[[], None]:
    model: nn.Module = make_model()
    quiet: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if name != ALONE:
        model = distributed(model, name)
        quiet = model.no_sync
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    inputs, targets = (whole.tensor_split(REPLICAS)[rank] for whole in make_batch())
    count = MICRO_BATCHES // REPLICAS

    def step() -> None:
        parts = zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True)
        for number, (x, y) in enumerate(parts):
            with quiet() if number < count - 1 else contextlib.nullcontext():
                (next_byte_loss(model(x), y) * (len(x) / len(inputs))).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    name, rank, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=REPLICAS)
    step = make_step(name, rank)
    serve(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
