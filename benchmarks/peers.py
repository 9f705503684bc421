"""What the pipeline benchmark compares with: one process, and torch's own pipelining over gloo, on the same work.

Each peer runs in processes of its own, so that all stand ready side by side and rounds can alternate between them.
Run as `peers.py PEER RANK RENDEZVOUS`: a line on standard input is a number of steps, the answer
the seconds that they took.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble

from gradwire.job.gpt import GPT, VOCABULARY, Shape, next_byte_loss

# 6.5 M parameters.
SHAPE = Shape(layers=8, width=256, heads=4, context=128)
BATCH = 32
MICRO_BATCHES = 8
LEARNING_RATE = 1e-3
# Name: (processes, threads each, stages each).
PEERS = {
    "one process, 1 thread": (1, 1, 0),
    "one process, 1 thread, 8 micro-batches": (1, 1, 0),
    "one process, 2 threads": (1, 2, 0),
    "torch pipelining on gloo, 1F1B": (2, 1, 1),
    "torch pipelining on gloo, ZBV": (2, 1, 2),
}
TOKENS_A_STEP = BATCH * SHAPE.context


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, VOCABULARY, (BATCH, SHAPE.context + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(SHAPE)


class Peer:
    """The processes of one peer. Leaving the `with` block ends them.

    They run `script NAME RANK RENDEZVOUS`: this file, unless the peer is another benchmark's. inside: for each rank the
    words that its command is begun with, such as those that enter a network namespace.
    """

    def __init__(
        self,
        name: str,
        *,
        processes: int | None = None,
        script: str = __file__,
        inside: Sequence[Sequence[str]] = (),
    ) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        if processes is None:
            processes, _, _ = PEERS[name]
        self._processes = [
            subprocess.Popen(
                [
                    *(inside[rank] if inside else ()),
                    *(sys.executable, script, name, str(rank), f"file://{self._folder.name}/rendezvous"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]

    def run(self, steps: int) -> float:
        """Run steps in all processes and return the seconds that the slowest took."""
        return max(map(float, self.ask(steps)))

    def ask(self, order: int | str) -> list[str]:
        """Give all processes an order, such as a number of steps, and return their answers, by rank."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{order}\n")
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{self.name!r} ended with {process.wait()}")
            answers.append(line)
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.communicate()
        self._folder.cleanup()


def one_process(micro_batches: int) -> Callable[[], None]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    inputs, targets = make_batch()

    def step() -> None:
        for x, y in zip(inputs.tensor_split(micro_batches), targets.tensor_split(micro_batches), strict=True):
            (next_byte_loss(model(x), y) * (len(x) / BATCH)).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        optimizer.zero_grad()

    return step


class Part(nn.Module):
    """Some blocks of the GPT, with the embeddings before the first and the head behind the last.

    Torch's pipelining knows no tied weights: the head has a matrix of its own here (1 % more parameters).
    """

    def __init__(self, model: GPT, first: int, last: int) -> None:
        super().__init__()
        self.token = model.embedding if first == 0 else None
        self.position = model.positions if first == 0 else None
        self.blocks = nn.ModuleList(list(model.blocks)[first:last])
        ends = last == SHAPE.layers
        self.norm = model.norm if ends else None
        self.head = nn.Linear(SHAPE.width, VOCABULARY, bias=False) if ends else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.token is not None and self.position is not None:
            x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def torch_pipeline(name: str, rank: int) -> Callable[[], None]:
    processes, _, stages_each = PEERS[name]
    total = processes * stages_each
    # In a V: rank 0 has the first and the last stage, rank 1 those between.
    mine = [rank] if stages_each == 1 else [rank, total - 1 - rank]
    model, size = make_model(), SHAPE.layers // total
    parts = [Part(model, i * size, (i + 1) * size) for i in mine]
    stages = [PipelineStage(part, i, total, torch.device("cpu")) for i, part in zip(mine, parts, strict=True)]
    schedule: Schedule1F1B | ScheduleZBVZeroBubble
    if stages_each == 1:
        schedule = Schedule1F1B(stages[0], MICRO_BATCHES, loss_fn=next_byte_loss)
    else:
        schedule = ScheduleZBVZeroBubble([*stages], MICRO_BATCHES, loss_fn=next_byte_loss)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    inputs, targets = make_batch()
    arguments = (inputs,) if 0 in mine else ()
    target = targets if total - 1 in mine else None

    def step() -> None:
        schedule.step(*arguments, target=target)
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(step: Callable[[], None]) -> None:
    """Take orders as `Peer` gives them: numbers of steps, each answered by the seconds until all processes had done."""
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            step()
        if dist.is_initialized():
            dist.barrier()
        print(time.perf_counter() - started, flush=True)


def main() -> None:
    name, rank, rendezvous = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    processes, threads, stages_each = PEERS[name]
    torch.set_num_threads(threads)
    if stages_each:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
        step = torch_pipeline(name, rank)
    else:
        step = one_process(MICRO_BATCHES if "micro-batches" in name else 1)
    serve(step)
    if stages_each:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
