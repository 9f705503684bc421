"""Files of a checkpoint: what safetensors reads is what was written, and the record is the file's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gradwire.checkpoint.files import record_of, write_tensors, write_text
from gradwire.checkpoint.writer import TensorFiles
from gradwire_protocol.errors import CheckpointError

_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
_TYPES += (torch.int8, torch.uint8, torch.bool, torch.complex64)


def some(data_type: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 50).to(data_type)


def test_every_type_and_layout_comes_back(tmp_path: Path) -> None:
    tensors = {str(data_type): some(data_type, 3, 5) for data_type in _TYPES}
    tensors |= {"scalar": torch.tensor(7.0), "empty": torch.empty(0, 4), "turned": torch.randn(4, 3).t()}
    tensors |= {
        "part": torch.randn(6, 6)[::2, 1:4],
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    path = tmp_path / "model.safetensors"
    record = write_tensors(path, tensors, {"tied": "yes"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "tied": "yes"}
    content = path.read_bytes()
    assert (record.size_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert record_of(path) == record


def test_no_file_is_written_over(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "text")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a", "text")


def test_a_type_without_a_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weight cannot.*complex128"):
        write_tensors(tmp_path / "a", {"weight": torch.zeros(1, dtype=torch.complex128)}, {})


def test_large_models_are_sharded_as_hugging_faces_are(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": torch.randn(10, 10) for index in range(5)}  # 400 bytes each
    files = TensorFiles(tmp_path, "model", shard_bytes=900)
    for name, tensor in tensors.items():
        files.add(name, tensor)
    records = files.finish({})
    shards = [f"model-{index:05}-of-00003.safetensors" for index in (1, 2, 3)]
    assert sorted(records) == sorted([*shards, "model.safetensors.index.json"])
    assert {path.name for path in tmp_path.iterdir()} == records.keys()
    assert all(record_of(tmp_path / name) == record for name, record in records.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
