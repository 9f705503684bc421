"""What can move the sums of tensor-parallel servers and of replicas: names, and the devices that they are for."""

from __future__ import annotations

AUTO, GRPC, GLOO, NCCL = "auto", "grpc", "gloo", "nccl"
TRANSPORTS = (GRPC, GLOO, NCCL)
# torch's own, with connections of their own; by the kind of device that each is for.
DEVICE_OF_TORCHS = {GLOO: "cpu", NCCL: "cuda"}
