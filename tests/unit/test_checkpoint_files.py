"""Files of a checkpoint: what safetensors reads is what was written, and the record is the file's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gradwire_protocol.checkpoint.files import (
    FileRecord,
    TensorFiles,
    name_files,
    record_of,
    write_safetensors,
    write_text,
)
from gradwire_protocol.errors import Aborted, CheckpointError
from gradwire_protocol.torch_tensors import raw_from

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
    record = write_safetensors(path, [raw_from(name, tensor) for name, tensor in tensors.items()], {"tied": "yes"})
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


def test_a_type_without_a_form_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"weight cannot.*complex128"):
        raw_from("weight", torch.zeros(1, dtype=torch.complex128))


def write(directory: Path, stem: str, tensors: dict[str, torch.Tensor], **changes: Any) -> list[tuple[str, FileRecord]]:
    files = TensorFiles(directory, stem, **{"tied": {}, **changes})
    for name, tensor in tensors.items():
        files.add(raw_from(name, tensor))
    return files.finish()


def test_large_models_are_sharded_as_hugging_faces_are(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": torch.randn(10, 10) for index in range(5)}  # 400 bytes each
    written = write(tmp_path, "model", tensors, shard_bytes=900)
    records = name_files(tmp_path, "model", written, {"head": "layer.0"})
    shards = [f"model-{index:05}-of-00003.safetensors" for index in (1, 2, 3)]
    assert sorted(records) == sorted([*shards, "model.safetensors.index.json"])
    assert {path.name for path in tmp_path.iterdir()} == records.keys()
    assert all(record_of(tmp_path / name) == record for name, record in records.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000, "head": "layer.0"}
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_files_of_several_writers_become_one_checkpoint(tmp_path: Path) -> None:
    first = write(tmp_path, "model-0", {"a": torch.ones(3)}, tied={"b": "a", "d": "c"})
    second = write(tmp_path, "model-1", {"c": torch.zeros(2)}, tied={"b": "a", "d": "c"})
    assert [name for name, _ in (*first, *second)] == ["model-0-0.unfinished", "model-1-0.unfinished"]
    files = name_files(tmp_path, "model", [*first, *second], {"b": "a", "d": "c"})
    assert list(files)[:2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    with safe_open(str(tmp_path / "model-00001-of-00002.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "b": "a"}


def test_a_kind_without_tensors_has_an_empty_file(tmp_path: Path) -> None:
    files = name_files(tmp_path, "optimizer", write(tmp_path, "optimizer", {}), {})
    assert load_file(tmp_path / "optimizer.safetensors") == {}
    assert list(files) == ["optimizer.safetensors"]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    written = [*write(tmp_path, "model-0", {"a": torch.ones(3)}), *write(tmp_path, "model-1", {"a": torch.ones(3)})]
    with pytest.raises(CheckpointError, match="'a' is in two files"):
        name_files(tmp_path, "model", written, {})


def test_a_write_that_is_stopped_ends_at_once(tmp_path: Path) -> None:
    def stop() -> None:
        raise Aborted("enough")

    with pytest.raises(Aborted, match="enough"):
        write(tmp_path, "model", {"a": torch.ones(3)}, go_on=stop)
