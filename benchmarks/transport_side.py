"""One side of one way, for transport.py: takes jobs as JSON lines on standard input, answers each with a line."""

from __future__ import annotations

import os
import sys

from gradwire_stage import allocator

if __name__ == "__main__" and sys.argv[1].startswith(("gradwire", "grpc-bytes")):
    allocator.configure()  # as a stage server does, before everything else

import argparse
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch

from gradwire_protocol.tls_files import TlsFiles
from transport_ways import WAYS, Receiver, Sender, open_receiver, open_sender


class Watch(threading.Thread):
    """Stands for a compute thread's Python: notes how long it is kept from running. `take` gives the longest so far."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._longest = 0.0
        self._done = False

    def run(self) -> None:
        clock, last = time.perf_counter, time.perf_counter()
        while not self._done:
            # As torch does: out of Python, and back into it when the interpreter is free.
            time.sleep(0.0002)
            now = clock()
            self._longest = max(self._longest, now - last - 0.0002)
            last = now

    def take(self) -> float:
        longest, self._longest = self._longest, 0.0
        return longest

    def end(self) -> None:
        self._done = True
        self.join()


class Answers:
    """The way back, the same for all ways: a byte on a socket."""

    def __init__(self, address: str = "") -> None:
        self.address = ""
        self._server: socket.socket | None = None
        self._connection: socket.socket | None = None
        if address:
            host, port = address.split(":")
            self._connection = socket.create_connection((host, int(port)))
        else:
            self._server = socket.create_server(("127.0.0.1", 0))
            self.address = "{}:{}".format(*self._server.getsockname())

    def give(self) -> None:
        self._connected().sendall(b"!")

    def wait(self) -> None:
        if not self._connected().recv(1):
            raise ConnectionError("the other side is gone")

    def _connected(self) -> socket.socket:
        if self._connection is None and self._server is not None:
            self._connection, _ = self._server.accept()
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._connection is None:
            raise ConnectionError("no connection")
        return self._connection


def receive_job(receiver: Receiver, answers: Answers, job: dict[str, Any]) -> dict[str, float]:
    """Receive as many tensors as the job says; answer after each, or after the last."""
    watch = Watch() if job["watch"] else None
    if watch is not None:
        watch.start()
    stalls = []
    cpu = time.process_time()
    for index in range(job["count"]):
        tensor = receiver.receive(job["size"])
        if job["read"]:
            tensor.sum()
        if job["each"] or index == job["count"] - 1:
            answers.give()
        if watch is not None:
            stalls.append(watch.take())
    cpu = time.process_time() - cpu
    if watch is not None:
        watch.end()
    return {"cpu": cpu, "stalls": stalls}  # type: ignore[dict-item]


def send_job(sender: Sender, answers: Answers, job: dict[str, Any]) -> dict[str, Any]:
    """Send as many tensors; return the seconds until the answer to the last, or of each."""
    tensor = torch.ones(job["size"] // 4)
    watch = Watch() if job["watch"] else None
    if watch is not None:
        watch.start()
    stalls, laps = [], []
    cpu, began = time.process_time(), time.perf_counter()
    for index in range(job["count"]):
        sender.send(tensor)
        if job["each"] or index == job["count"] - 1:
            answers.wait()
            laps.append(time.perf_counter())
        if watch is not None:
            stalls.append(watch.take())
    cpu = time.process_time() - cpu
    if watch is not None:
        watch.end()
    seconds = [late - early for early, late in zip([began, *laps], laps, strict=False)]
    return {"cpu": cpu, "stalls": stalls, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("side", choices=("receive", "send"))
    parser.add_argument("--tls", type=Path, nargs=3, metavar=("AUTHORITY", "CERTIFICATE", "KEY"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tls = None
    if arguments.tls:
        authority, certificate, key = arguments.tls
        tls = TlsFiles(authority=authority, certificate=certificate, key=key)

    # Libraries may write to standard output; the answers have it to themselves.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    if arguments.side == "receive":
        receiver, answers = open_receiver(arguments.way, tls), Answers()
        answer({"address": receiver.address, "answers": answers.address})
        for line in sys.stdin:
            answer(receive_job(receiver, answers, json.loads(line)))
    else:
        where = json.loads(sys.stdin.readline())
        sender, answers = open_sender(arguments.way, where["address"], tls), Answers(where["answers"])
        answer({})
        for line in sys.stdin:
            answer(send_job(sender, answers, json.loads(line)))
    os._exit(0)  # nothing here is worth an orderly end


if __name__ == "__main__":
    main()
