"""The CPU device: bytes without copies, measured rates; names of devices that are not there."""

from __future__ import annotations

import pytest
import torch

from gradwire_protocol.errors import SettingsError
from gradwire_stage.device import CpuDevice, open_device


def test_payloads_are_the_tensors_own_memory() -> None:
    device = CpuDevice(1)
    tensor = torch.arange(6000, dtype=torch.float32).reshape(2, 3000).t()
    payload = device.payload(tensor)
    assert isinstance(payload, memoryview)
    assert payload.nbytes == 24000
    tensor[0, 0] = 5
    assert payload.cast("B").cast("f")[0] == 5
    assert device.claim(device.receive(tensor)) is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
def test_few_bytes_are_a_copy_in_memory_order(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 2], [0, 3, 4]]).to(dtype)
    for made in (tensor, tensor.t(), tensor[1:], tensor[:0]):
        payload = CpuDevice(1).payload(made)
        assert isinstance(payload, memoryview)
        first = made.storage_offset() * made.element_size()
        assert payload.tobytes() == bytes(tensor.untyped_storage())[first : first + made.nbytes]


def test_numbers_come_in_order_and_keep_their_precision() -> None:
    device = CpuDevice(1)
    tensors = [torch.tensor(0.1, dtype=torch.float64), torch.tensor(3), torch.tensor(0.5, requires_grad=True)]
    assert device.numbers(tensors) == [0.1, 3.0, 0.5]
    assert device.numbers([]) == []


def test_the_description_is_measured() -> None:
    info = open_device("cpu", 1).describe()
    assert info.kind == "cpu"
    assert info.threads == 1
    assert info.flops_per_second > 1e8
    assert info.bytes_per_second > 1e8
    assert 2**28 < info.memory_bytes < 2**50


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:", "cuda:-1", "", "cpu:0"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="Not a device"):
        open_device(name, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingsError, match="no device cuda:3"):
        open_device("cuda:3", 1)
    assert open_device("auto", 1).torch_device.type == "cpu"
