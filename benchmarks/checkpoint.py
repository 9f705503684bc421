"""What a checkpoint of 100 MB of weights costs a run that trains on: ten steps with one beside ten without.

Rounds with and without a checkpoint take turns; the stall is between the medians. The optimizer's state (AdamW: twice
the weights again) is in the checkpoint, and so are hashing and syncing all of it, in this process or in the stage
servers (--storage), on the same cores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import gradwire
from gradwire.checkpoint.run import Storage
from gradwire.job.gpt import GPT, Shape, next_byte_loss
from report import Claim, add_arguments, finish

STEPS_A_ROUND = 10
SHAPE = Shape(layers=8, width=512, heads=8, context=128)
MICRO_BATCHES = 4


def make_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (rows, SHAPE.context + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def timed_round(
    trainer: gradwire.Trainer, batch: tuple[torch.Tensor, torch.Tensor], path: Path | None, storage: Storage
) -> list[float]:
    """Return the seconds of ten steps; with a checkpoint, of its dispatch and of its writing, too."""
    times = []
    began = time.perf_counter()
    saving = None
    for result in trainer.run([batch] * STEPS_A_ROUND, progress=False):
        if path is not None and saving is None and result.step:
            saving = trainer.save(path, wait=False, storage=storage)
            times.append(time.perf_counter() - began)
    times.insert(0, time.perf_counter() - began)
    if saving is not None:
        if not saving.done:
            print("the checkpoint took longer than the steps; its rest is not in the figures")
        saving.wait()
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="with a checkpoint, and as many without")
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--directory", type=Path, help="where to write [default: a temporary directory]")
    parser.add_argument("--storage", choices=("client", "server"), default="client", help="who writes the files")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    batch = make_batch(arguments.rows)
    model = GPT(SHAPE)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    directory = Path(tempfile.mkdtemp(dir=arguments.directory, prefix="gradwire-checkpoint-"))
    # Servers take paths as seen from the directory that they are started with.
    place = Path() if arguments.storage == "server" else directory
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    try:
        with (
            gradwire.local(stage_servers=2, threads=1, checkpoint_root=directory) as cluster,
            cluster.trainer(
                model,
                torch.optim.AdamW(model.parameters(), lr=1e-4),
                loss=next_byte_loss,
                example=batch,
                plan=gradwire.Plan(stages=2, microbatches=MICRO_BATCHES),
            ) as trainer,
        ):
            del model
            trainer.step(*batch)
            timed_round(trainer, batch, place / "warm-up", arguments.storage)
            for number in range(arguments.rounds):
                # In turns, and each first as often as the other.
                for kind in ("without", "with") if number % 2 else ("with", "without"):
                    path = place / str(number) if kind == "with" else None
                    seconds[kind].append(timed_round(trainer, batch, path, arguments.storage)[0])
            began = time.perf_counter()
            trainer.save(place / "alone", storage=arguments.storage)
            alone = time.perf_counter() - began
        size = sum(file.stat().st_size for file in (directory / "alone").iterdir())
    finally:
        shutil.rmtree(directory)

    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    stall = median["with"] / median["without"] - 1
    rows = [
        {"ten steps": kind, "seconds": median[kind], "fastest": min(values), "slowest": max(values)}
        for kind, values in seconds.items()
    ]
    print(f"{size / 1e6:.0f} MB on disk; {alone:.2f} s from save to disk while nothing else runs")
    claims = [
        Claim.at_least("weights in the checkpoint, MB", weights / 1e6, 100),
        Claim.below("checkpointing 100 MB of weights, stall over ten steps", stall, 0.05),
    ]
    title = f"GPT, {SHAPE.layers} layers of width {SHAPE.width}, {arguments.rows} rows of {SHAPE.context}, 2 stages"
    finish(title, rows, claims, arguments)


if __name__ == "__main__":
    main()
