"""Weight files: what safetensors itself writes is read, and nothing that is damaged, hostile or ambiguous is."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gradwire_protocol.errors import DataError, GradwireError, SettingsError
from gradwire_protocol.safetensors_format import STORED_TYPES, read_header
from gradwire_protocol.torch_tensors import DATA_TYPES, tensor_from_file
from gradwire_protocol.v1 import graph_pb2
from gradwire_protocol.weight_files import open_tensor_files, reads_from_files

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(4, dtype=torch.bfloat16), "none": torch.zeros(0, 2)}


def spec_of(name: str, tensor: torch.Tensor, *others: str) -> graph_pb2.TensorSpec:
    return graph_pb2.TensorSpec(
        name=name,
        names=[name, *others],
        kind=graph_pb2.TENSOR_KIND_PARAMETER,
        data_type=DATA_TYPES[tensor.dtype],
        shape=tensor.shape,
    )


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", sorted(DATA_TYPES, key=str), ids=str)
def test_every_type_comes_back_as_it_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    if dtype is torch.complex128:
        assert DATA_TYPES[dtype] not in STORED_TYPES.values()  # the format lacks it
        return
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    save_file({"x": tensor, "number": torch.tensor(1).to(dtype)}, tmp_path / "a.safetensors", metadata={"made": "here"})
    files = open_tensor_files(tmp_path / "a.safetensors")
    assert len(files) == 2
    for name, expected in {"x": tensor, "number": torch.tensor(1).to(dtype)}.items():
        stored = files.find(spec_of(name, expected))
        read = tensor_from_file(stored, DATA_TYPES[dtype])
        assert read.dtype is dtype
        assert torch.equal(read, expected)


def test_files_index_and_directory_lead_to_the_same_tensors(tmp_path: Path) -> None:
    save_file({"a": STATE["a"]}, tmp_path / "one.safetensors")
    save_file({"b.c": STATE["b.c"], "none": STATE["none"]}, tmp_path / "two.safetensors")
    by_directory = open_tensor_files(tmp_path)
    places = {"a": "one.safetensors", "b.c": "two.safetensors", "none": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file({"a": STATE["a"]}, tmp_path / "not-in-the-index.safetensors")
    for files in (by_directory, open_tensor_files(tmp_path), open_tensor_files(index)):
        for name, tensor in STATE.items():
            stored = files.find(spec_of(name, tensor))
            assert stored.file.name == places[name]
            assert torch.equal(tensor_from_file(stored, DATA_TYPES[tensor.dtype]), tensor)


def test_a_tensor_is_found_by_any_of_its_names_below_the_prefix(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    files = open_tensor_files(tmp_path)
    spec = spec_of("head.weight", STATE["a"], "body.a")
    assert files.find(spec, "body.").name == "a"
    assert reads_from_files(spec, "body.")
    assert not reads_from_files(spec, "tail.")
    with pytest.raises(DataError, match=r"no tensor 'head.weight'.*'head.weight' or 'body.a'.*among them a.*prefix"):
        files.find(spec)
    for kind, persistent, expected in (("BUFFER", True, True), ("BUFFER", False, False), ("CONSTANT", False, False)):
        spec.kind, spec.persistent = graph_pb2.TensorKind.Value(f"TENSOR_KIND_{kind}"), persistent
        assert reads_from_files(spec, "") is expected


def test_only_types_that_lose_nothing_are_converted(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    save_file(
        {str(dtype): values.to(dtype) for dtype in DATA_TYPES if dtype is not torch.complex128},
        tmp_path / "a.safetensors",
    )
    files = open_tensor_files(tmp_path)
    for stored_type in DATA_TYPES:
        for wanted in DATA_TYPES:
            if stored_type is torch.complex128:
                continue
            spec = spec_of(str(stored_type), values.to(wanted))
            same_kind = (
                stored_type.is_floating_point == wanted.is_floating_point
                and stored_type.is_complex == wanted.is_complex
                and (stored_type is torch.bool) == (wanted is torch.bool)
            )
            if stored_type is wanted or (same_kind and torch.promote_types(stored_type, wanted) is wanted):
                read = tensor_from_file(files.find(spec), spec.data_type)
                assert read.dtype is wanted
                assert torch.equal(read, values.to(stored_type).to(wanted))
            else:
                with pytest.raises(DataError, match="lose precision"):
                    files.find(spec)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED: list[tuple[Any, bytes, str]] = [
    (b"not json", b"", "JSON"),
    (b'{"a": 1, "a": 2}', b"", "stands twice"),
    (b"[" * 100_000, b"", "JSON"),
    (b"[]", b"", "a JSON object"),
    ({"a": 3}, b"", "type, shape and place"),
    ({"a\ud800": GOOD}, bytes(8), "names of tensors that can be shown"),
    ({"a": GOOD | {"dtype": "F32\n"}}, bytes(8), "type, shape and place"),
    ({"a": GOOD | {"shape": [-2]}}, bytes(8), "a shape of tensor 'a'"),
    ({"a": GOOD | {"shape": [True, 2]}}, bytes(8), "a shape of tensor 'a'"),
    ({"a": GOOD | {"shape": [1] * 33}}, bytes(8), "a shape of tensor 'a'"),
    ({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8), "a place of tensor 'a'"),
    ({"a": GOOD | {"data_offsets": [0]}}, bytes(8), "a place of tensor 'a'"),
    ({"a": GOOD | {"shape": [3]}}, bytes(8), "12 bytes of tensor 'a'"),
    ({"a": GOOD | {"shape": [2**62], "data_offsets": [0, 2**62]}}, bytes(8), "bytes of tensor 'a'"),
    ({"a": GOOD | {"shape": [2**60], "data_offsets": [0, 2**62]}}, bytes(8), "truncated"),
    ({"a": GOOD}, bytes(7), "for tensor 'a'.*truncated"),
    ({"a": GOOD}, bytes(9), "for tensor 'a'"),
]


@pytest.mark.parametrize(("header", "data", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    file = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(DataError, match=f"a.safetensors is not a sound.*{message}"):
        read_header(file)


@pytest.mark.parametrize("content", [b"", b"\2", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 1) + b"{}"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="a header within the file"):
        read_header(tmp_path / "a.safetensors")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_change_of_a_file_gives_anything_but_tensors_or_a_data_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("changed") / "a.safetensors"
    save_file(STATE, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        for stored in read_header(file).values():
            assert len(stored.read()) == stored.size_bytes <= len(content)
    except DataError:
        pass


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, suffix: str) -> None:
    pickle = tmp_path / f"model{suffix}"
    torch.save(STATE, pickle)
    for path in (pickle, tmp_path):
        with pytest.raises(DataError, match=rf"model\{suffix} is a pickle.*save_file"):
            open_tensor_files(path)
    # A pickle by another name has no sound header.
    pickle.rename(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"model.safetensors is not a sound"):
        open_tensor_files(tmp_path)


def test_what_is_missing_or_ambiguous_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no weights at .*nowhere"):
        open_tensor_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no weights in"):
        open_tensor_files(tmp_path)
    save_file(STATE, tmp_path / "one.safetensors")
    save_file(STATE, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"is in two files.*one.safetensors and two.safetensors"):
        open_tensor_files(tmp_path)
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(DataError, match="several indices"):
        open_tensor_files(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(DataError, match="a regular file"):
        open_tensor_files(tmp_path / "pipe.safetensors")
    with pytest.raises(DataError, match=r"'a' in .*one.safetensors does not fit.*\[5\].*\[2, 3\]"):
        open_tensor_files(tmp_path / "one.safetensors").find(spec_of("a", torch.zeros(5)))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "a weight_map"),
        ({"weight_map": {"a": 3}}, "a weight_map"),
        ({"weight_map": {"a": "../one.safetensors"}}, "names of .safetensors files beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names of .safetensors files beside it"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "names of .safetensors files beside it"),
        ({"weight_map": {"a": "one.bin"}}, "names of .safetensors files beside it"),
        ({"weight_map": {"z": "one.safetensors"}}, "tensor 'z' in one.safetensors"),
        ({"weight_map": {"a": "lost.safetensors"}}, "lost.safetensors cannot be read"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    save_file(STATE, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        open_tensor_files(tmp_path)


def test_no_file_outside_the_root_is_read(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "inside", root / "store", outside):
        folder.mkdir(parents=True)
    save_file(STATE, outside / "a.safetensors")
    save_file(STATE, root / "store/blob")
    link = root / "inside/a.safetensors"
    link.symlink_to(root / "store/blob")  # as Hugging Face's cache does
    assert len(open_tensor_files(root / "inside", root=root)) == 3
    link.unlink()
    link.symlink_to(outside / "a.safetensors")
    assert len(open_tensor_files(root / "inside")) == 3
    with pytest.raises(SettingsError, match="leads out of its root"):
        open_tensor_files(root / "inside", root=root)
    (root / "inside/model.safetensors.index.json").symlink_to(outside / "index.json")
    with pytest.raises(GradwireError, match="is not there"):
        open_tensor_files(root / "inside", root=root)


def test_a_file_that_shrinks_while_in_use_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(STATE, file)
    stored = open_tensor_files(file).find(spec_of("a", STATE["a"]))
    os.truncate(file, stored.offset + 5)
    with pytest.raises(DataError, match="ends within tensor 'a'"):
        stored.read()
