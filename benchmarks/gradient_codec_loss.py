"""What a lossy codec of gradients costs in quality: the reference job's validation loss in 2 replicas, over 3 seeds.

Runs `gradwire train` once for each codec and seed, but for the check at the end: of one seed the same text, the same
first weights, the same order. The claims are about means over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from allreduce import NONE, POWERSGD, TOPK
from reference_job import train
from report import Claim, add_arguments, finish

CODECS = (NONE, "fp16", "bf16", "int8", "topk(density=0.1)", TOPK, "topk(density=0.001)", POWERSGD)
SEEDS = (0, 1, 2)
# Of the loss without a codec.
CLAIMED = {TOPK: "topk at 1 %", POWERSGD: "powersgd at rank 4"}
BAR = 0.02


def row_of(codec: str, summaries: Sequence[dict[str, Any]], exact: float) -> dict[str, Any]:
    losses = [summary["validation_loss"] for summary in summaries]
    mean = statistics.mean(losses)
    return {
        "codec": codec,
        "steps": summaries[0]["steps"],
        "seeds": len(losses),
        "validation loss, nats a byte": mean,
        "lowest": min(losses),
        "highest": max(losses),
        "to none, %": 100 * (mean / exact - 1),
        "tokens a second": statistics.median(summary["tokens_per_second"] for summary in summaries),
    }


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """What was not measured does not hold."""
    more = {row["codec"]: row["to none, %"] / 100 for row in rows}
    return [
        Claim.below(
            f"{name} brings the reference job within 2 % of the uncompressed validation loss",
            more.get(codec, float("nan")),
            BAR,
        )
        for codec, name in CLAIMED.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), metavar="CODEC", help="none always runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="SEED")
    parser.add_argument("--steps", type=int, help="fewer than the reference job's")
    add_arguments(parser)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    exact = 0.0
    for codec in dict.fromkeys((NONE, *arguments.codecs)):
        summaries = [
            train("--stages", "1", "--replicas", "2", "--compression", codec, seed=seed, steps=arguments.steps)
            for seed in arguments.seeds
        ]
        exact = exact or statistics.mean(summary["validation_loss"] for summary in summaries)
        rows.append(row_of(codec, summaries, exact))
        print(f"{codec}: {rows[-1]['validation loss, nats a byte']:.4f} nats a byte", flush=True)
    finish("The reference job in two replicas, with each codec of gradients", rows, claims_of(rows), arguments)


if __name__ == "__main__":
    main()
