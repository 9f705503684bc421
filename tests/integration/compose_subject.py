"""Trains for some seconds in the ways that the dashboards show, in a client's container. Argument: seconds of each."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import gradwire

PLANS = (
    gradwire.Plan(stages=2, replicas=2, microbatches=4, compression="int8", activation_compression="int8"),
    gradwire.Plan(stages=2, replicas=2, microbatches=4, exchange="parameter-server(staleness=1)"),
)
WIDTH, ROWS = 256, 64


def main(seconds: float) -> None:
    torch.manual_seed(1)
    with gradwire.connect(os.environ["GRADWIRE_COORDINATOR"], gradwire.TlsFiles.in_folder("/certs")) as cluster:
        for number, plan in enumerate(PLANS):
            layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
            model = nn.Sequential(*layers, nn.Linear(WIDTH, 8))
            batch = torch.randn(ROWS, WIDTH), torch.randint(0, 8, (ROWS,))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            with cluster.trainer(model, optimizer, loss=F.cross_entropy, example=batch, plan=plan) as trainer:
                started = time.monotonic()
                while time.monotonic() - started < seconds:
                    trainer.step(*batch)
                # Servers write it, to the volume that they have in common.
                trainer.save(f"dashboards-{number}", storage="server")
                # For two more looks of Prometheus.
                time.sleep(11)
            print(f"trained {trainer.run_id}", flush=True)


main(float(sys.argv[1]))
