"""The GPT on one stage of 2 tensor-parallel servers, one thread each: tokens a second, beside torch's own.

On loopback, where our servers share memory, or are told not to: then all goes through gRPC. All contenders stand ready
side by side and take turns, round after round; ratios are medians over rounds. Beside them one process with one thread,
and a pipeline of two stages on the same two servers' worth of processors.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch

import gradwire
from gradwire.job.gpt import next_byte_loss
from peers import BATCH, LEARNING_RATE, MICRO_BATCHES, Peer, make_batch, make_model
from report import Claim, add_arguments, finish
from tensor_peers import DTENSOR, SERVERS
from tensor_peers import __file__ as PEERS_SCRIPT
from turns import Contender, Speeds, speed_ratio, take_turns

ONE = "one process, 1 thread"
SHARED, GRPC, GLOO = "gradwire, shared memory", "gradwire, gRPC alone", "gradwire, gloo"
PIPELINE = "gradwire, 2 stages instead"


@contextlib.contextmanager
def environment(**names: str) -> Iterator[None]:
    """Run with these variables, which the processes that start meanwhile inherit."""
    before = dict(os.environ)
    os.environ.update(names)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def make_contender(stack: contextlib.ExitStack, plan: gradwire.Plan, *, shared_memory: bool = True) -> Contender:
    with environment(GRADWIRE_STAGE_SHARED_MEMORY=str(int(shared_memory))):
        cluster = stack.enter_context(gradwire.local(stage_servers=SERVERS, threads=1))
    model = make_model()
    trainer = stack.enter_context(
        cluster.trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
            loss=next_byte_loss,
            example=make_batch(),
            plan=plan,
        )
    )

    def run(steps: int) -> float:
        return sum(result.seconds for result in trainer.run([make_batch()] * steps, progress=False))

    return run


def rows_of(found: Speeds) -> list[dict[str, Any]]:
    return [
        {
            "contender": name,
            "tokens a second": statistics.median(speeds),
            "× torch": speed_ratio(found, name, DTENSOR),
            "× one process": speed_ratio(found, name, ONE),
            "slowest": min(speeds),
            "fastest": max(speeds),
        }
        for name, speeds in found.items()
    ]


def claims_of(found: Speeds) -> list[Claim]:
    """What was not measured does not hold."""
    return [
        Claim.at_least(
            "With gloo on loopback, 2-way tensor on the 6.5 M GPT reaches ≥ 0.9 × what torch's own "
            "`parallelize_module` with DTensor reaches in the same run",
            speed_ratio(found, GLOO, DTENSOR),
            0.9,
        ),
        Claim.at_least("with gRPC ≥ 0.5 ×", speed_ratio(found, GRPC, DTENSOR), 0.5),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        over_grpc = gradwire.Plan(tensor=SERVERS, microbatches=MICRO_BATCHES, transport="grpc")
        contenders = {
            SHARED: make_contender(stack, over_grpc),
            GRPC: make_contender(stack, over_grpc, shared_memory=False),
            GLOO: make_contender(stack, dataclasses.replace(over_grpc, transport="gloo")),
            PIPELINE: make_contender(stack, gradwire.Plan(stages=SERVERS, microbatches=MICRO_BATCHES)),
            DTENSOR: stack.enter_context(Peer(DTENSOR, processes=SERVERS, script=PEERS_SCRIPT)).run,
            ONE: stack.enter_context(Peer(ONE)).run,
        }
        found = take_turns(contenders, arguments.rounds, arguments.steps)
    title = f"GPT, 8 layers of width 256, context 128, batch {BATCH}, {MICRO_BATCHES} micro-batches"
    finish(title, rows_of(found), claims_of(found), arguments)


if __name__ == "__main__":
    main()
