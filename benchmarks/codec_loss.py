"""What a lossy codec on the boundaries costs in quality: the reference job's validation loss with each, to its end.

Runs `gradwire train` once for each codec, but for the check at the end: same text, same first weights, same order.
"""

from __future__ import annotations

import argparse
from typing import Any

from reference_job import train
from report import Claim, add_arguments, finish

CODECS = ("none", "bf16", "fp16", "int8")
# Of the loss without a codec.
BAR = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", default=CODECS, choices=CODECS, metavar="CODEC", help="none always runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="fewer than the reference job's")
    add_arguments(parser)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    exact = 0.0
    for codec in dict.fromkeys(("none", *arguments.codecs)):
        summary = train("--activation-compression", codec, seed=arguments.seed, steps=arguments.steps)
        loss = summary["validation_loss"]
        exact = exact or loss
        rows.append(
            {
                "codec": codec,
                "steps": summary["steps"],
                "validation loss, nats a byte": loss,
                "to none, %": 100 * (loss / exact - 1),
                "tokens a second": summary["tokens_per_second"],
            }
        )
    claims = [
        Claim.below(
            f"{row['codec']}: final validation loss of the reference job within 1 %", abs(row["to none, %"]) / 100, BAR
        )
        for row in rows[1:]
    ]
    finish("The reference job on two stages, with each codec on their boundary", rows, claims, arguments)


if __name__ == "__main__":
    main()
