"""Everything that differs between a CPU and a GPU: copies, streams, clocks, rates. The rest of the server asks here.

A compute thread never waits for a copy: what leaves the device goes as a payload that the sending thread waits for,
and what comes in is copied while the thread that received it holds it. The host waits for the device only where
numbers are asked for (`numbers`) and where an entry's time is summed up (the clock), both at the end of an entry.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from gradwire_protocol.delivery import Payload
from gradwire_protocol.errors import SettingsError
from gradwire_protocol.torch_tensors import payload_of
from gradwire_protocol.v1 import coordinator_pb2
from gradwire_stage.codecs.registry import Encoded
from gradwire_stage.timeline import Clock, HostClock

_MEASURE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Arrived:
    """A tensor on its way to the device; only `Device.claim` may look inside."""

    tensor: torch.Tensor
    done: Any = None  # event of the copy's stream; None where there is nothing to wait for
    encoded: Encoded | None = None  # how to make the tensor of it, where it travelled under a codec


class Device(Protocol):
    """What the server needs of a device."""

    torch_device: torch.device

    def enter_compute_thread(self) -> None:
        """Prepare the calling thread for computing. First thing it does."""

    def clock(self) -> Clock[Any]:
        """Return the clock of the compute thread's timeline."""

    def payload(self, tensor: torch.Tensor) -> Payload:
        """Return the bytes of a dense tensor, as it is now. Does not wait; nobody may write to it afterwards."""

    def receive(self, tensor: torch.Tensor, encoded: Encoded | None = None) -> Arrived:
        """Begin to bring a tensor, or the payload that it is encoded in, from host memory to the device. Any thread."""

    def claim(self, arrived: Arrived) -> torch.Tensor:
        """Return a tensor, decoded, that the compute thread can use from now on. Compute thread only."""

    def numbers(self, tensors: Sequence[torch.Tensor]) -> list[float]:
        """Return the values of 0-d tensors, after waiting for the device once."""

    def give_back_memory(self) -> None:
        """Return free memory to the system."""

    def describe(self) -> coordinator_pb2.DeviceInfo:
        """Return name, memory and measured rates. Takes up to 0.3 s."""


def open_device(name: str, threads: int) -> Device:
    """Open "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one. SettingsError if there is none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice(threads)
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise SettingsError("Not a device", expected='"auto", "cpu", "cuda" or "cuda:N"', got=repr(name))
    if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"There is no device {name}",
            expected=f"one of {torch.cuda.device_count()} CUDA devices",
            got=f"torch {torch.__version__}",
            remedy="install a CUDA build of torch and a driver, or use --device cpu",
        )
    return CudaDevice(int(index or 0), threads)


def _rate(work: Callable[[], object], amount: float, synchronize: Callable[[], None]) -> float:
    """Return `amount` per second of `work`, over about _MEASURE_SECONDS."""
    work()
    synchronize()
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _MEASURE_SECONDS:
        work()
        synchronize()
        done += 1
    return amount * done / seconds


def _rates(device: torch.device, size: int, synchronize: Callable[[], None]) -> tuple[float, float]:
    """Measure (floating-point operations, bytes moved) a second."""
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    product = torch.empty_like(a)
    flops = _rate(lambda: torch.mm(a, b, out=product), 2.0 * size**3, synchronize)
    source = torch.zeros(8 * size * size, device=device)
    target = torch.empty_like(source)
    copied = _rate(lambda: target.copy_(source), 2.0 * source.nbytes, synchronize)  # one read, one write
    return flops, copied


def host_memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or its control group's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        text = path.read_text().strip() if path.exists() else "max"
        if text.isdecimal():
            total = min(total, int(text))
    return total


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class CpuDevice:
    """Host memory and threads: nothing to copy, nothing to wait for."""

    torch_device = torch.device("cpu")

    def __init__(self, threads: int) -> None:
        self._threads = threads
        torch.set_num_threads(threads)

    def enter_compute_thread(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps the number for each thread

    def clock(self) -> Clock[Any]:
        return HostClock()

    def payload(self, tensor: torch.Tensor) -> Payload:
        return payload_of(tensor)

    def receive(self, tensor: torch.Tensor, encoded: Encoded | None = None) -> Arrived:
        return Arrived(tensor, encoded=encoded)

    def claim(self, arrived: Arrived) -> torch.Tensor:
        return arrived.tensor if arrived.encoded is None else arrived.encoded.decode(arrived.tensor)

    def numbers(self, tensors: Sequence[torch.Tensor]) -> list[float]:
        return [float(tensor.detach()) for tensor in tensors]

    def give_back_memory(self) -> None:
        """The C allocator's free memory is given back by allocator.py."""

    def describe(self) -> coordinator_pb2.DeviceInfo:
        flops, copied = _rates(self.torch_device, 512, lambda: None)
        return coordinator_pb2.DeviceInfo(
            kind="cpu",
            name=_processor_name(),
            memory_bytes=host_memory_bytes(),
            threads=self._threads,
            flops_per_second=flops,
            bytes_per_second=copied,
        )


class CudaClock:
    """Time on the compute stream: events that the GPU stamps when it reaches them."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def elapsed(self, marks: Sequence[torch.cuda.Event]) -> list[int]:
        marks[-1].synchronize()
        return [
            round(start.elapsed_time(end) * 1e6)  # milliseconds to nanoseconds
            for start, end in pairwise(marks)
        ]


class CudaDevice:
    """One GPU: computing on its default stream, copies on a stream for each way, through pinned host memory."""

    def __init__(self, index: int, threads: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self._threads = threads
        torch.set_num_threads(threads)
        with torch.cuda.device(self.torch_device):
            self._outwards = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
            self._inwards = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def enter_compute_thread(self) -> None:
        torch.cuda.set_device(self.torch_device)
        torch.set_num_threads(self._threads)

    def clock(self) -> Clock[Any]:
        return CudaClock()

    def payload(self, tensor: torch.Tensor) -> Payload:
        tensor = tensor.detach()
        if not tensor.is_cuda:  # a number that the graph made on the host
            return payload_of(tensor)
        made = torch.cuda.current_stream(self.torch_device).record_event()
        # Pinned memory comes from torch's cache, which reuses a block when the copies from and to it are done.
        host = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self._outwards):
            self._outwards.wait_event(made)
            host.copy_(tensor, non_blocking=True)
            # Blocking: the thread that waits for it sleeps.
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self._outwards)
        # The allocator must not hand the tensor's memory out again before the copy has read it.
        tensor.record_stream(self._outwards)

        def wait() -> memoryview:
            copied.synchronize()
            return payload_of(host)

        return wait

    def receive(self, tensor: torch.Tensor, encoded: Encoded | None = None) -> Arrived:
        # Received memory is not pinned, and a copy from it would make the host wait.
        pinned = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor)
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._inwards):
            on_device = pinned.to(self.torch_device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._inwards)
        return Arrived(on_device, done, encoded)

    def claim(self, arrived: Arrived) -> torch.Tensor:
        if arrived.done is not None:
            compute = torch.cuda.current_stream(self.torch_device)
            compute.wait_event(arrived.done)
            # Made on the copying stream: its memory must not go back there while computing reads it.
            arrived.tensor.record_stream(compute)
        return arrived.tensor if arrived.encoded is None else arrived.encoded.decode(arrived.tensor)

    def numbers(self, tensors: Sequence[torch.Tensor]) -> list[float]:
        if not tensors:
            return []
        stacked = torch.stack([tensor.detach().to(self.torch_device, torch.float64) for tensor in tensors])
        values: list[float] = stacked.tolist()
        return values

    def give_back_memory(self) -> None:
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    def describe(self) -> coordinator_pb2.DeviceInfo:
        with torch.cuda.device(self.torch_device):
            properties = torch.cuda.get_device_properties(self.torch_device)
            flops, copied = _rates(self.torch_device, 4096, torch.cuda.synchronize)
        return coordinator_pb2.DeviceInfo(
            kind="cuda",
            name=properties.name,
            memory_bytes=properties.total_memory,
            threads=self._threads,
            flops_per_second=flops,
            bytes_per_second=copied,
        )
