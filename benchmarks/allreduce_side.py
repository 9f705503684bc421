"""One process of one way, for allreduce.py: takes jobs as JSON lines on standard input, answers each with a line."""

from __future__ import annotations

import os
import sys

from gradwire_stage import allocator

if __name__ == "__main__" and sys.argv[1].startswith("gradwire"):
    allocator.configure()  # as a stage server does, before everything else

import argparse
import json
import logging
import time
from typing import Any

import structlog
import torch

from allreduce_ways import WAYS, Member, make_member


def measure(member: Member, codec: str, count: int) -> dict[str, Any]:
    """Add up so often; return the seconds of all calls together, and the processor's."""
    member.all_reduce(codec)  # after this all members are here
    cpu, began = time.process_time(), time.perf_counter()
    for _ in range(count):
        member.all_reduce(codec)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def do(member: Member, job: dict[str, Any]) -> dict[str, Any]:
    match job["do"]:
        case "connect":
            member.connect(job["addresses"])
        case "prepare":
            member.prepare(job["size"])
        case "measure":
            return measure(member, job["codec"], job["count"])
        case "received":
            return {"bytes": member.received_bytes(job["codec"])}
        case other:
            raise ValueError(f"no such job: {other}")
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("rank", type=int)
    parser.add_argument("members", type=int)
    parser.add_argument("--codecs", nargs="+", default=[])
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--listen", default="127.0.0.1:0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))

    # Libraries may write to standard output; the answers have it to themselves.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    member = make_member(
        arguments.way,
        arguments.rank,
        arguments.members,
        codecs=arguments.codecs,
        rendezvous=arguments.rendezvous,
        listen=arguments.listen,
    )
    answer({"addresses": member.addresses})
    for line in sys.stdin:
        answer(do(member, json.loads(line)))
    os._exit(0)  # nothing here is worth an orderly end


if __name__ == "__main__":
    main()
